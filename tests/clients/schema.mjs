import { asked, client, options, report } from "./client.mjs";

const [question, schema] = options;
const response_format = { type: "json_schema", json_schema: { name: "count", schema: JSON.parse(schema) } };
const completion = await client.chat.completions.create({ ...asked(question), response_format });
report(JSON.parse(completion.choices[0].message.content));
