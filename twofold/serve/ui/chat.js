/* The conversation: turns of one question and one answer, and what a reader may do with them. */

import { Answer } from "/ui/answer.js";
import { ApiError, chat } from "/ui/api.js";
import { copyButton } from "/ui/clipboard.js";
import { el, iconButton } from "/ui/element.js";

/** Holds the turns and runs one stream at a time. `page` is told what happens: notice, announce, busy, changed, focus, key. */
export class Chat {
  constructor(transcript, settings, page) {
    this.transcript = transcript;
    this.settings = settings;
    this.page = page;
    this.turns = [];
    this.cleared = [];
    this.running = null;
  }

  get busy() {
    return this.running !== null;
  }

  /** Ask something new. */
  send(question) {
    const turn = { question, answer: null, node: el("article", { class: "turn" }) };
    this.turns.push(turn);
    this.transcript.append(turn.node);
    return this.run(turn);
  }

  /** Break off the answer that is being written; what is there stays. */
  stop() {
    this.running?.abort();
  }

  /** Answer the last question again. */
  again() {
    const turn = this.turns.at(-1);
    if (turn && !this.busy) this.run(turn);
  }

  /** Ask `turn` otherwise; the turns after it go, for they answered another conversation. */
  edit(turn, question) {
    this.stop();
    for (const later of this.turns.splice(this.turns.indexOf(turn) + 1)) later.node.remove();
    turn.question = question;
    this.run(turn);
    this.page.focus(); // what was pressed is gone
  }

  /** Forget all turns; `restore` brings them back as long as nothing new was asked. */
  clear() {
    this.stop();
    this.cleared = this.turns;
    this.turns = [];
    this.transcript.replaceChildren();
    this.page.changed();
  }

  restore() {
    if (this.turns.length) return;
    this.turns = this.cleared;
    this.transcript.replaceChildren(...this.turns.map((turn) => turn.node));
    this.page.changed();
  }

  /** The cell under a token's span, wherever in the conversation it is. */
  cell(span) {
    const turn = this.turns.find(({ node }) => node.contains(span));
    return turn?.answer?.tokens.cells[Number(span.dataset.cell)];
  }

  /* What the model is told: turns that never got an answer are left out, or two questions would stand side by side. */
  messages(upTo) {
    const said = this.turns.slice(0, this.turns.indexOf(upTo)).filter(({ answer }) => answer?.text);
    return [
      ...this.settings.system(),
      ...said.flatMap(({ question, answer }) => [
        { role: "user", content: question },
        { role: "assistant", content: answer.text },
      ]),
      { role: "user", content: upTo.question },
    ];
  }

  async run(turn) {
    this.stop();
    const running = (this.running = new AbortController());
    const answer = (turn.answer = new Answer());
    this.show(turn);
    this.page.notice(null);
    this.page.busy(true);
    this.page.announce("Answering");
    let end;
    try {
      const body = { ...this.settings.sampling(), messages: this.messages(turn) };
      for await (const chunk of chat(body, running.signal)) answer.push(chunk);
    } catch (error) {
      end = this.broken(error, turn);
    }
    answer.finish(end);
    if (this.running === running) {
      this.running = null;
      this.page.busy(false);
      this.page.announce(end === "stopped" ? "Stopped" : end === "failed" ? "" : `Answer: ${answer.text.slice(0, 2000)}`);
    }
  }

  broken(error, turn) {
    if (error.name === "AbortError") return "stopped";
    if (!(error instanceof ApiError)) throw error;
    if (error.status === 401) this.page.key(() => this.turns.at(-1) === turn && this.run(turn));
    this.page.notice(error.message, "Try again", () => this.again());
    return "failed";
  }

  /* The nodes of a turn, made anew whenever it is asked (again). */
  show(turn) {
    const { question, answer, node } = turn;
    answer.tools.append(
      copyButton("Copy the answer", () => answer.text),
      iconButton("again", "Answer again", () => this.edit(turn, turn.question)),
    );
    node.replaceChildren(
      el(
        "div",
        { class: "question" },
        el("h3", { class: "hidden" }, "You"),
        el("div", { class: "bubble" }, question),
        el(
          "div",
          { class: "tools" },
          copyButton("Copy the question", () => turn.question),
          iconButton("edit", "Edit the question", () => this.rewrite(turn)),
        ),
      ),
      el("h3", { class: "hidden" }, "Answer"),
      answer.node,
    );
    this.page.changed();
  }

  /* The question becomes a field: Enter asks it, Esc leaves it as it was. */
  rewrite(turn) {
    const bubble = turn.node.querySelector(".bubble");
    const field = el("textarea", { class: "bubble rewrite", "aria-label": "Edit the question", rows: turn.question.split("\n").length });
    field.value = turn.question;
    const leave = () => field.replaceWith(bubble);
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        leave();
        turn.node.querySelector(".question button:last-child").focus();
      } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        if (field.value.trim()) this.edit(turn, field.value.trim());
      }
    });
    field.addEventListener("blur", () => field.isConnected && field.value === turn.question && leave());
    bubble.replaceWith(field);
    field.focus();
    field.setSelectionRange(field.value.length, field.value.length);
  }
}
