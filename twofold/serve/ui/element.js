/* Elements made of nodes alone: text is always a text node, so nothing a model writes can become markup. */

const SVG = "http://www.w3.org/2000/svg";

/**
 * A new element. `props` are attributes, but for `class`, `on` (listeners by event name) and `data` (the dataset);
 * false, null and undefined leave an attribute out. Children are nodes or strings.
 */
export function el(tag, props = {}, ...children) {
  return fill(document.createElement(tag), props, children);
}

/** The same for a node of SVG. */
export function svg(tag, props = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), props, children);
}

/** One icon of the page's sprite, by name; decoration only, the button around it carries the words. */
export function icon(name) {
  return svg("svg", { class: "icon", "aria-hidden": "true" }, svg("use", { href: `#i-${name}` }));
}

/** A quiet button that shows an icon and says its label to those who cannot see it. */
export function iconButton(name, label, click) {
  return el("button", { type: "button", class: "quiet small", title: label, "aria-label": label, on: { click } }, icon(name));
}

function fill(node, { on = {}, data = {}, ...attributes }, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value === true ? "" : value);
  }
  for (const [event, listener] of Object.entries(on)) node.addEventListener(event, listener);
  Object.assign(node.dataset, data);
  node.append(...children.flat(2));
  return node;
}
