/* The question for a key: asked by whoever met the 401; what that held up starts again once the key is given. */

import { hasKey, keepKey } from "/ui/api.js";

/**
 * Wires the dialog that every page carries. `given()` is called after a key was kept, before what was held up;
 * `refused(again)` when the reader would rather not. Returns `ask(then)`.
 */
export function keyDialog({ given, refused }) {
  const [dialog, field, why, cancel] = ["key-dialog", "key", "key-why", "key-cancel"].map((id) => document.getElementById(id));
  let held = () => {};

  function ask(then) {
    held = then;
    if (hasKey()) why.textContent = "The key given before is not one the server knows.";
    if (!dialog.open) dialog.showModal();
  }

  cancel.addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => {
    if (dialog.returnValue === "save" && field.value) {
      keepKey(field.value.trim());
      given();
      held();
    } else {
      refused(() => ask(held));
    }
    field.value = "";
    dialog.returnValue = "";
  });
  return ask;
}
