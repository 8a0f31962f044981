// Errors before a stream and, with the engine that the test puts there, within it.
import OpenAI from "openai";
import { asked, client, options, report } from "./client.mjs";

try {
  const stream = await client.chat.completions.create({ ...asked("Hello"), stream: true, ...JSON.parse(options[0]) });
  for await (const chunk of stream);
  report({ kind: null });
} catch (error) {
  const kind = ["NotFoundError", "BadRequestError", "APIError"].find((name) => error instanceof OpenAI[name]);
  const { status, code, param, requestID, message } = error;
  report({ kind, status, code, param, requestID, message });
}
