// The library's own loop: it calls the function and sends the result, until there is an answer.
import { asked, client, options, report } from "./client.mjs";

const [question, result, tool] = options;
const { function: described } = JSON.parse(tool);
const called = [];
const run = (name, args) => {
  called.push([name, args]);
  return result;
};
const tools = [
  { type: "function", function: { ...described, parse: JSON.parse, function: (args) => run(described.name, args) } },
];
const whole = await client.chat.completions.runTools({ ...asked(question), tools }).finalContent();
const streamed = await client.chat.completions.runTools({ ...asked(question), tools, stream: true }).finalContent();
report({ called, whole, streamed });
