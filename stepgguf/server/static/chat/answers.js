// Answers as they come. The server makes an answer and keeps it whether or not anybody listens, so a page that was
// reloaded, or a phone that was locked, finds it again:
//
//     POST v1/responses, in the background -events-> take -> the answer's fields
//     GET v1/responses/ID?stream=true&starting_after=CURSOR      from then on, whenever the stream breaks off
//
// An answer has reasoning, content, usage; tokens: how many there are so far, thoughts: those of the reasoning; id and
// cursor: where it is on the server and what was read of it; at: when it was asked for, and when its first token, the
// end of its reasoning and its last token came, in ms, as far as this page was there; and end: "running", "stop",
// "length", "stopped", "lost" (the server has it no longer), "error" with `error`.

import { clock, say } from "./dom.js";
import { api, events, problem } from "./server.js";
import { settings } from "./settings.js";

const PATIENCE = [0, 1000, 2000, 4000, 8000]; // ms before the first, second, ... try to find a running answer again
const KEPT = 2 * 3_600_000; // ms; the server forgets an answer after an hour

export const runs = new Map(); // chat id -> {chat, answer, stop, lost}: what is being answered there

/** What the model is asked: the messages before the answer, without answers that never got to their text. */
function request(messages) {
  const input = messages.filter(({ content }) => content).map(({ role, content }) => ({ role, content }));
  const { system, reasoning_effort, max_tokens, ...numbers } = settings();
  const fields = Object.fromEntries(Object.entries(numbers).map(([name, value]) => [name, Number(value)]));
  if (system) fields.instructions = system;
  if (reasoning_effort) fields.reasoning = { effort: reasoning_effort };
  if (max_tokens) fields.max_output_tokens = Number(max_tokens);
  return { input, background: true, store: true, stream: true, ...fields };
}

export const newAnswer = () => ({
  role: "assistant", reasoning: "", content: "", tokens: 0, at: { asked: clock() },
  end: "running", max_tokens: Number(settings().max_tokens) || undefined,
});

/** Asks for an answer, or goes on with one that was asked for. changed(run) is called with every event. */
export async function run(chat, index, before, changed) {
  const answer = chat.messages[index], stop = new AbortController(), running = { chat, answer, stop, lost: false };
  const asked = answer.id ? null : JSON.stringify(request(before));
  runs.set(chat.id, running);
  try {
    for (let tries = 0; answer.end === "running"; tries++) {
      if (tries) await pause(PATIENCE[Math.min(tries, PATIENCE.length) - 1], stop.signal);
      await listen(running, asked, () => { tries = 0; changed(running); });
      running.lost = answer.end === "running";
      if (running.lost) changed(running);
    }
  } catch (error) {
    if (stop.signal.aborted) answer.end = "stopped";
    else if (answer.id && error.status === 404) answer.end = "lost";
    else if (answer.id && error.status === 401) running.lost = true; // it is found again with the right key
    else Object.assign(answer, { end: "error", error: error.message });
  }
  runs.delete(chat.id);
}

/** One connection, until it ends. Raises what the server says against it, and that a question did not get there. */
async function listen(running, asked, changed) {
  const { chat, answer, stop: { signal } } = running;
  const again = `v1/responses/${answer.id}?stream=true&count_tokens=true&starting_after=${answer.cursor}`;
  let isLive = !answer.id; // else what came while nobody listened comes first, and the first count ends it
  try {
    const response = answer.id ? await api(again, { signal })
      : await api("v1/responses?count_tokens=true", { method: "POST", body: asked, signal });
    for await (const event of events(response)) {
      take(answer, event, isLive ? clock() : null);
      isLive ||= event.tokens !== undefined;
      changed();
      if (answer.end !== "running") return;
      if (running.unwanted && answer.id) stop(chat.id);
    }
  } catch (error) {
    if (signal.aborted || !answer.id || error.status < 500) throw error;
  }
  if (!answer.id) throw problem({ message: "The connection was lost before the answer began." });
}

/** Waits, but not longer than until the page is seen again or the network is back. */
function pause(ms, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(done, ms), causes = ["online", "visibilitychange"];
    function done() {
      clearTimeout(timer);
      causes.forEach((cause) => removeEventListener(cause, done, true));
      signal.removeEventListener("abort", done);
      if (signal.aborted) reject(signal.reason);
      else resolve();
    }
    causes.forEach((cause) => addEventListener(cause, done, true));
    signal.addEventListener("abort", done);
  });
}

const ENDS = { completed: "stop", incomplete: "length", cancelled: "stopped", failed: "error" };

/** now: null if it happened when nobody knows. */
function take(answer, { type, sequence_number, response, delta, tokens, message }, now) {
  const { at } = answer;
  if (type === "error") throw problem({ message }); // the stream's, not the answer's
  if (tokens === undefined) answer.cursor = sequence_number;
  else answer.tokens = tokens;
  if (tokens && answer.content) answer.thoughts ??= tokens - 1; // it is counted after the first of the text
  if (response) answer.id = response.id;
  if (response?.status in ENDS) {
    Object.assign(answer, { end: ENDS[response.status], usage: response.usage ?? undefined });
    if (response.error) answer.error = `${response.error.message}\nRequest ${response.id.replace("resp_", "")}`;
    if (now === null) at.last = null;
  }
  if (type === "response.reasoning_text.delta") {
    if (!answer.reasoning) say("Thinking");
    answer.reasoning += delta;
  } else if (type === "response.output_text.delta") {
    if (!answer.content) say("Answering");
    answer.content += delta;
    if (at.thought === undefined) at.thought = now;
  } else return;
  at.first ??= now;
  at.last = now;
}

/** Ends an answer on the server; its last event says so. Where the server is out of reach, it ends here. */
export async function stop(id) {
  const running = runs.get(id), { answer } = running ?? {};
  if (!running) return;
  running.unwanted = !answer.id; // as soon as the server has said where it is
  if (answer.id) await api(`v1/responses/${answer.id}/cancel`, { method: "POST" }).catch(() => running.stop.abort());
}

/** Ends the reasoning of an answer: it goes on with its text. */
export const answerNow = ({ id }) => api(`v1/responses/${id}/end_reasoning`, { method: "POST" });

/** The server forgets an answer, and ends it if it is still being made. */
export function discard(chat) {
  runs.get(chat.id)?.stop.abort();
  for (const { id, at } of chat.messages) {
    if (id && clock() - at.asked < KEPT) api(`v1/responses/${id}`, { method: "DELETE" }).catch(() => {});
  }
}
