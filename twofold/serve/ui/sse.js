/* Server-sent events from a fetch: EventSource cannot POST, so the stream is cut into events here. */

/** The data of each event in a stream of bytes, in order; comments and fields other than `data` are passed over. */
export async function* events(stream) {
  let rest = "";
  let data = [];
  for await (const text of chunks(stream)) {
    rest += text;
    const lines = rest.split(/\r\n|\n|\r(?!$)/); // a last \r may be half of \r\n: wait for the next chunk
    rest = lines.pop();
    for (const line of lines) {
      if (line === "") {
        if (data.length) yield data.join("\n");
        data = [];
      } else if (line.startsWith("data:")) {
        data.push(line.slice(line[5] === " " ? 6 : 5));
      }
    }
  }
}

/* Text as it arrives. Not `for await` over the stream itself: not every browser offers that yet. */
async function* chunks(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield decoder.decode(value, { stream: true });
    }
  } finally {
    reader.cancel().catch(() => {}); // a reader that left early must not keep the server busy
  }
}
