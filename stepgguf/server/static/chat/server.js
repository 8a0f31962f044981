// The server's API: a request with the key, and the events of a stream.

import { askForKey, key } from "./key.js";

/** An Error to show. status: the answer's, undefined where the server was not reached or the connection was lost. */
export const problem = ({ message, request_id }, status) =>
  Object.assign(new Error(request_id ? `${message}\nRequest ${request_id}` : message), { status });

export async function api(path, options = {}) {
  const headers = { "content-type": "application/json" }, given = key();
  if (given) headers.authorization = `Bearer ${given}`;
  const response = await fetch(path, { ...options, headers }).catch((error) => {
    throw error.name === "AbortError" ? error : problem({ message: "The server cannot be reached." });
  });
  if (response.ok) return response;
  if (response.status === 401) askForKey(given);
  const body = await response.json().catch(() => ({}));
  throw problem(body.error ?? { message: `The server answered with status ${response.status}.` }, response.status);
}

const SILENCE = 30_000; // ms; the server shows every 10 s that it is there, so the line is dead

/** The data of server-sent events, until the stream ends or falls silent; {tokens} where a comment counts them. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let buffer = ""; ;) {
    const timer = setTimeout(() => reader.cancel(), SILENCE);
    const { done, value } = await reader.read().catch(() => ({ done: true }));
    clearTimeout(timer);
    if (done) return;
    const records = (buffer + value).split("\n\n");
    buffer = records.pop();
    for (const record of records) {
      const data = record.split("\n").find((line) => line.startsWith("data: "))?.slice(6);
      const tokens = /^: (\d+) tokens$/.exec(record)?.[1];
      if (data) yield JSON.parse(data);
      else if (tokens) yield { tokens: Number(tokens) }; // other comments are signs of life
    }
  }
}
