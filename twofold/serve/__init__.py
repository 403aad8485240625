"""The engine, to the world: an OpenAI-compatible HTTP API and its pages, in front of the model's own process.

The server
config.py    every setting and limit, with its reason
server.py    everything wired together; SIGTERM and the way out
protocol.py  limits on a request's head and on connections, inside uvicorn's protocol
guard.py     host, key, body: what is refused before any route runs
app.py       the routes
reload.py    keys and limits read again while it runs
shared.py    what all models of a server have in common
log.py       plain or JSON lines

What is asked
openai.py    requests: fields, checks, and what is not done
messages.py  a chat's messages
forms.py     what an answer must look like: response_format, structured_outputs
judge.py     whether that can be enforced, known before the request is accepted
tools.py     what may be called, and what was
bodies.py    a body read as one of these, or the error that names the field
errors.py    OpenAI's error shape, and the status of each error

The routes of texts that go on
calls.py     one API call as the sequences it is made of
texts.py     prompts and chats to ids
hearing.py   how a chat's answers are listened to
enforced.py  the form of answers that must call
choice.py    one sequence as text: stops, end
said.py      what a chat's answer says next, for the APIs with shapes of their own
shape.py     text and log-probabilities in OpenAI's shapes
answers.py   those shapes
stream.py    answers at once or as events, and the client that leaves

Other routes
responses/   OpenAI's Responses API
anthropic/   Anthropic's Messages API
batches/     files, and batches of requests in them
readings.py  the routes of texts that are read and not continued: embeddings, scores, labels
reads.py     their requests and answers
reading.py   one such call: its texts to the engine, and what comes of each
generate.py  token in, token out
tokens.py    the routes between text and ids
adapters.py  those that load adapters, and which there are
status.py    the routes that say what is served and how it is
openapi.py   the OpenAPI document
described.py what each route takes and answers

Several models
fleet.py     several models, and which of them are in memory
switch.py    a request's way to the model that it names

The model's process
client.py    the front's end of the model's process: accept, watch, start again, resubmit
asks.py      what else is asked of it, and who waits for the answer
process.py   one run of that process
wire.py      the messages between the two
worker.py    the process itself: the engine's step loop
model.py     what it loads

What is known of it
metrics.py   Prometheus, with vLLM's names
record.py    what became of one API call: times, counts, settings
ledger.py    those records, kept for a while, and the routes that tell of them
fate.py      how a sequence fared in the model's process
history.py   what the server did in the last half hour
tracing.py   requests as OpenTelemetry spans

The pages
pages.py     the pages' files
runs.py      runs of training, read from their logs
ui/          the pages, chat, overview and training: HTML, CSS, JavaScript
"""

from .config import Limits, ServeConfig, Watch

__all__ = ["Limits", "ServeConfig", "Watch"]
