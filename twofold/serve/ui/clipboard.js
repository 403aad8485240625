/* Copying, also where the page came over plain HTTP from another machine and the browser hides its clipboard. */

import { el, icon, iconButton } from "/ui/element.js";

const TICK_MS = 1200;

/** A button that copies what `text()` gives, and says so by a tick for a moment. */
export function copyButton(label, text) {
  const button = iconButton("copy", label, async () => {
    await copy(text());
    button.replaceChildren(icon("done"));
    setTimeout(() => button.replaceChildren(icon("copy")), TICK_MS);
  });
  return button;
}

async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const before = document.activeElement;
  const field = el("textarea", { class: "hidden", "aria-hidden": "true" });
  field.value = text;
  document.body.append(field);
  field.select();
  document.execCommand("copy");
  field.remove();
  before?.focus();
}
