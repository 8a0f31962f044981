// As NVIDIA's page has it: choices may be missing, the thinking is reasoning_content.
import { asked, client, options, report } from "./client.mjs";

const found = { reasoning: "", content: "", reasons: [] };
for await (const chunk of await client.chat.completions.create({ ...asked(options[0]), stream: true })) {
  const choice = chunk.choices[0];
  found.reasoning += choice?.delta?.reasoning_content ?? "";
  found.content += choice?.delta?.content ?? "";
  if (choice?.finish_reason) found.reasons.push(choice.finish_reason);
}
report(found);
