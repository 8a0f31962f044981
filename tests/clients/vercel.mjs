// Vercel's default provider speaks Responses and lets the server keep its items: what comes back of an answer are ids.
import { createOpenAI } from "@ai-sdk/openai";
import { generateText, jsonSchema, stepCountIs, streamText } from "ai";

const [, , baseURL, question, result, described, next] = process.argv;
const { name, parameters } = JSON.parse(described).function;
const sent = [];
const recorded = (url, init) => {
  sent.push(JSON.parse(init.body));
  return fetch(url, init);
};
const model = createOpenAI({ baseURL, apiKey: "none", fetch: recorded })("step-3.5-flash");
const called = [];
const execute = (args) => {
  called.push(args);
  return result; // a text: the embedded model knows JSON with spaces only
};
const asked = {
  model,
  tools: { [name]: { inputSchema: jsonSchema(parameters), execute } },
  stopWhen: stepCountIs(4),
  temperature: 0,
  maxRetries: 0,
};
const messages = [{ role: "user", content: question }];

const whole = await generateText({ ...asked, messages });
const streamed = await streamText({ ...asked, messages }).text;

// the conversation goes on: with its items, and by the answer's id
const made = whole.steps.flatMap((step) => step.response.messages);
const history = [...messages, ...made, { role: "user", content: next }];
const further = await generateText({ ...asked, messages: history });
const previousResponseId = whole.finalStep.response.id;
const continued = await generateText({
  ...asked,
  messages: [{ role: "user", content: next }],
  providerOptions: { openai: { previousResponseId } },
});

console.log(
  JSON.stringify({
    called,
    texts: [whole.text, streamed, further.text, continued.text],
    steps: whole.steps.map((step) => step.finishReason),
    sent: sent.at(-2).input.map((item) => item.type ?? item.role),
    referred: sent.at(-1).previous_response_id === previousResponseId,
  }),
);
