// What the scripts beside this one share: a client of the server that the first argument names, and its last line.
import OpenAI from "openai";

export const [, , baseURL, ...options] = process.argv;
export const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
export const asked = (content) => ({ model: "step-3.5-flash", messages: [{ role: "user", content }], temperature: 0 });
export const report = (found) => console.log(JSON.stringify(found));
