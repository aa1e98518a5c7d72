// What the page asks the server: the list of models, and answers as they stream.

let key = "";

export function useKey(text) {
  key = text;
}

/** An answer of the server that says what is wrong. */
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export async function models() {
  const response = await fetch("/v1/models", { headers: headers() });
  await check(response);
  return (await response.json()).data;
}

/** Ask; `grow(text)` gets the answer so far. Resolves to the last chunk, with times and pruning. */
export async function ask(model, messages, grow, signal) {
  const response = await fetch("/v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json", ...headers() },
    body: JSON.stringify({ model, messages, stream: true, details: true }),
    signal,
  });
  await check(response);
  let text = "";
  let last = {};
  for await (const chunk of events(response.body)) {
    if (chunk.error) throw new Refused(500, chunk.error.message);
    const [choice] = chunk.choices;
    if (choice.delta.content) grow((text += choice.delta.content));
    if (choice.finish_reason) last = { ...chunk, finish: choice.finish_reason };
  }
  if (!last.finish) throw new Refused(500, "the answer was cut off; ask again");
  return { ...last, text };
}

function headers() {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function check(response) {
  if (response.ok) return;
  const body = await response.json().catch(() => ({}));
  throw new Refused(response.status, body.error?.message ?? `status ${response.status}`);
}

/** The objects of a stream of server-sent events, which come in pieces of any length. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}
