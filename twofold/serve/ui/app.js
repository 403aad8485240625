/* The page: who listens to whom. */

import { models } from "/ui/api.js";
import { Chat } from "/ui/chat.js";
import { el } from "/ui/element.js";
import { keyDialog } from "/ui/key.js";
import { Popover } from "/ui/popover.js";
import { allowed, Settings } from "/ui/settings.js";
import { Live } from "/ui/stats.js";

const IDEAS = ["What does itertools.groupby do?", "How do I read a JSON file?", "Write a function that reverses a list."];

const $ = (id) => document.getElementById(id);
const prompt = $("prompt");
const scroller = $("scroller");

const settings = new Settings($("settings"), $("model"));
const live = new Live($("live"), $("live-state"), describe);
const page = { notice, announce, busy, changed, focus: () => prompt.focus(), key: (then) => askKey(then) };
const chat = new Chat($("transcript"), settings, page);
const popover = new Popover(scroller, $("popover"), (span) => chat.cell(span));

/* Words above the message field, with at most one thing to do about them; null takes them away. */
function notice(text, label = null, action = null) {
  const act = () => {
    notice(null);
    action();
  };
  $("notice").replaceChildren(...(text ? [el("span", {}, text)] : []));
  if (label) $("notice").append(el("button", { type: "button", class: "quiet small", on: { click: act } }, label));
  $("notice").hidden = !text;
}

function announce(text) {
  $("announce").textContent = text;
}

function busy(now) {
  $("send").hidden = now;
  $("stop").hidden = !now;
}

function changed() {
  $("welcome").hidden = chat.turns.length > 0;
  $("clear").disabled = chat.turns.length === 0;
  popover.hide();
  follow(true);
}

/* Stay at the end while text arrives, unless the reader went up to read. */
let following = true;

function follow(now = false) {
  if (now) following = true;
  if (following) scroller.scrollTop = scroller.scrollHeight;
}

scroller.addEventListener("scroll", () => {
  following = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 48;
  $("latest").hidden = following;
}, { passive: true });
new ResizeObserver(() => {
  popover.settle();
  follow();
}).observe($("transcript"));
$("latest").addEventListener("click", () => follow(true));

function fit() {
  prompt.style.setProperty("height", "auto");
  prompt.style.setProperty("height", `${prompt.scrollHeight}px`);
}

function send(text) {
  const wrong = settings.invalid();
  if (wrong) {
    showPanel(true);
    wrong.focus();
    notice(allowed(wrong));
    return;
  }
  if (!text.trim() || chat.busy) return;
  prompt.value = "";
  fit();
  chat.send(text.trim());
}

prompt.addEventListener("input", fit);
prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send(prompt.value);
});
$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send(prompt.value);
});
$("stop").addEventListener("click", () => chat.stop());
$("clear").addEventListener("click", () => {
  chat.clear();
  notice("The chat was cleared.", "Undo", () => chat.restore());
  prompt.focus();
});
$("tint").addEventListener("click", () => {
  const on = $("tint").getAttribute("aria-pressed") !== "true";
  $("tint").setAttribute("aria-pressed", String(on));
  $("transcript").classList.toggle("tinted", on);
  localStorage.setItem("twofold.tint", on ? "on" : "off");
});
if (localStorage.getItem("twofold.tint") === "on") $("tint").click();

$("ideas").append(...IDEAS.map((idea) => el("li", {}, el("button", { type: "button", on: { click: () => send(idea) } }, idea))));

/* On a narrow window the panel lies over the chat; on a wide one it stands beside it and the button folds it away. */
const narrow = matchMedia("(max-width: 60rem)");

function showPanel(open) {
  document.body.classList.toggle("panel-open", open);
  $("panel-toggle").setAttribute("aria-expanded", String(open));
  $("panel").inert = !open;
  const over = open && narrow.matches;
  $("top").inert = $("main").inert = over;
  $("veil").hidden = !over;
}

function closePanel() {
  showPanel(false);
  $("panel-toggle").focus();
}

showPanel(!narrow.matches);
narrow.addEventListener("change", () => showPanel(!narrow.matches));
$("panel-toggle").addEventListener("click", () => {
  showPanel(!document.body.classList.contains("panel-open"));
  if (!$("veil").hidden) $("panel-close").focus();
});
$("panel-close").addEventListener("click", closePanel);
$("veil").addEventListener("click", closePanel);

/* Esc takes away the nearest thing first: the popover, the panel that covers the chat, then the answer being written. */
function escape() {
  if (popover.open) popover.hide();
  if (chat.busy) chat.stop();
  else if (!$("veil").hidden) closePanel();
}

addEventListener("keydown", (event) => {
  const writing = event.target.matches("input, textarea, select");
  if (event.key === "Escape" && !$("key-dialog").open) escape();
  const call = (event.key === "/" && !writing) || (event.key.toLowerCase() === "k" && (event.ctrlKey || event.metaKey));
  if (!call || event.altKey) return;
  event.preventDefault();
  prompt.focus();
});

const askKey = keyDialog({
  given: () => {
    notice(null);
    start();
  },
  refused: (again) => notice("This server asks for an API key.", "Enter it", again),
});

function start() {
  live.tick();
  describe();
}

/* Which model it is; asked again when the server says that it has become ready. */
async function describe() {
  try {
    const served = await models();
    $("model").replaceChildren(...served.map(({ id }) => el("option", {}, id)));
    $("model").disabled = served.length < 2;
    const room = served[0]?.max_model_len;
    $("context").textContent = room ? `${room.toLocaleString("en")} tokens of context` : "";
  } catch (error) {
    if (error.status === 401) askKey(() => {});
    else notice(error.message, "Try again", start);
  }
}

changed();
fit();
start();
prompt.focus();
