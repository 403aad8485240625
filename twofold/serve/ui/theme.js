/* Light, dark, or as the system says. A plain script in the head: it runs before the first paint, so nothing flashes. */
"use strict";

(() => {
  const NAMES = ["auto", "light", "dark"];
  const root = document.documentElement;

  function apply(name) {
    if (name === "auto") delete root.dataset.theme;
    else root.dataset.theme = name;
  }

  function remembered() {
    const name = localStorage.getItem("twofold.theme");
    return NAMES.includes(name) ? name : "auto";
  }

  apply(remembered());

  addEventListener("DOMContentLoaded", () => {
    const now = document.getElementById("theme-now");
    now.textContent = remembered();
    document.getElementById("theme").addEventListener("click", () => {
      const next = NAMES[(NAMES.indexOf(remembered()) + 1) % NAMES.length];
      localStorage.setItem("twofold.theme", next);
      now.textContent = next;
      apply(next);
    });
  });
})();
