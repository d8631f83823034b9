// Talking to the server: models, streamed answers, feedback. Knows nothing of the page.

let key = sessionStorage.getItem("caravan.key") || "";

export function useKey(given) {
  key = given.trim();
  if (key) sessionStorage.setItem("caravan.key", key);
  else sessionStorage.removeItem("caravan.key");
}

/** What the server said is wrong; `code` and `status` tell which way out there is. */
export class Refused extends Error {
  constructor(status, error) {
    super(error?.message || `HTTP ${status}`);
    this.status = status;
    this.code = error?.code;
  }
}

function headers() {
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function checked(response) {
  if (response.ok) return response;
  let error;
  try {
    error = (await response.json()).error;
  } catch {
    error = undefined; // not our error body: the status says enough
  }
  throw new Refused(response.status, error);
}

export async function pageSettings() {
  return (await checked(await fetch("/web/page.json"))).json();
}

export async function models() {
  return (await (await checked(await fetch("/v1/models", { headers: headers() }))).json()).data;
}

export async function sendFeedback(body) {
  await checked(await fetch("/feedback", { method: "POST", headers: headers(), body: JSON.stringify(body) }));
}

/**
 * Stream one answer. `onText(piece)` for each piece; resolves to {id, reason}.
 * Aborting `signal` stops the server too, for it watches the connection.
 */
export async function answer(request, signal, onText) {
  const body = JSON.stringify({ ...request, stream: true });
  const response = await checked(
    await fetch("/v1/chat/completions", { method: "POST", headers: headers(), body, signal }),
  );
  let id = "";
  let reason = null;
  for await (const data of events(response.body)) {
    if (data === "[DONE]") break;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Refused(500, chunk.error);
    id = chunk.id;
    for (const choice of chunk.choices) {
      if (choice.delta.content) onText(choice.delta.content);
      reason = choice.finish_reason ?? reason;
    }
  }
  return { id, reason };
}

/** The data of each server-sent event. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    held += value;
    const whole = held.split("\n\n");
    held = whole.pop();
    for (const event of whole) if (event.startsWith("data: ")) yield event.slice(6);
  }
}
