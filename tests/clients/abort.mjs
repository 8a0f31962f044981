// Leaves an answer that has no end after its third chunk, and lives on until its standard input ends.
import { once } from "node:events";
import { client, options, report } from "./client.mjs";

const controller = new AbortController();
const body = { ...JSON.parse(options[0]), model: "step-3.5-flash", stream: true };
const stream = await client.chat.completions.create(body, { signal: controller.signal });
let n = 0;
for await (const chunk of stream) if (++n === 3) controller.abort();
report({ aborted: controller.signal.aborted });
process.stdin.resume();
await once(process.stdin, "end");
