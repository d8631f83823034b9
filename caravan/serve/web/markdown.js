// A small part of Markdown, built from elements and text nodes alone: what a model writes can never become markup.
// Known: paragraphs, # headings, - and 1. lists, > quotes, ``` blocks, `code`, **strong**, *emphasis*.
// Links and images are left as the text they are: a model must not be able to send the reader, or the reader's
// data, somewhere.

/** The elements for a text. */
export function render(text) {
  const made = document.createDocumentFragment();
  const lines = text.replace(/\r\n?/g, "\n").split("\n");
  for (let at = 0; at < lines.length; ) at = block(lines, at, made);
  return made;
}

const FENCE = /^\s*(`{3,}|~{3,})/;
const HEADING = /^(#{1,4})\s+(.*)$/;
const BULLET = /^\s*[-*+]\s+(.*)$/;
const NUMBER = /^\s*(\d{1,6})[.)]\s+(.*)$/;
const QUOTE = /^\s*>\s?(.*)$/;

/** One block beginning at line `at`; returns the line after it. */
function block(lines, at, into) {
  const line = lines[at];
  if (!line.trim()) return at + 1;
  const fence = FENCE.exec(line);
  if (fence) return fenced(lines, at + 1, fence[1], into);
  const heading = HEADING.exec(line);
  if (heading) {
    into.append(filled(`h${Math.min(heading[1].length + 1, 4)}`, heading[2]));
    return at + 1;
  }
  if (BULLET.test(line)) return list(lines, at, BULLET, "ul", 1, into);
  const number = NUMBER.exec(line);
  if (number) return list(lines, at, NUMBER, "ol", 2, into, Number(number[1]));
  if (QUOTE.test(line)) return gathered(lines, at, (next) => QUOTE.exec(next)?.[1], "blockquote", into);
  return gathered(lines, at, (next) => (next.trim() && (next === line || !starts(next)) ? next : undefined), "p", into);
}

function starts(line) {
  return [FENCE, HEADING, BULLET, NUMBER, QUOTE].some((form) => form.test(line));
}

function fenced(lines, at, mark, into) {
  const body = [];
  while (at < lines.length && !lines[at].trim().startsWith(mark)) body.push(lines[at++]);
  const code = document.createElement("code");
  code.textContent = body.join("\n");
  const pre = document.createElement("pre");
  pre.tabIndex = 0;
  pre.append(code);
  into.append(pre);
  return at + 1;
}

function list(lines, at, form, name, group, into, start = 1) {
  const made = document.createElement(name);
  if (start !== 1) made.start = start;
  for (let found; at < lines.length && (found = form.exec(lines[at])); at++) made.append(filled("li", found[group]));
  into.append(made);
  return at;
}

function gathered(lines, at, take, name, into) {
  const body = [];
  for (let found; at < lines.length && (found = take(lines[at])) !== undefined; at++) body.push(found);
  into.append(filled(name, body.join("\n")));
  return at;
}

function filled(name, text) {
  const made = document.createElement(name);
  inline(text, made);
  return made;
}

const SPAN = /(`+)([^`]|[^`][\s\S]*?[^`])\1(?!`)|\*\*(?=\S)([\s\S]*?\S)\*\*|\*(?=[^\s*])([^*\n]*?[^\s*])\*/g;

function inline(text, into) {
  let last = 0;
  for (const found of text.matchAll(SPAN)) {
    into.append(text.slice(last, found.index));
    if (found[2] !== undefined) {
      const code = document.createElement("code");
      code.textContent = found[2];
      into.append(code);
    } else {
      const made = document.createElement(found[3] !== undefined ? "strong" : "em");
      inline(found[3] ?? found[4], made);
      into.append(made);
    }
    last = found.index + found[0].length;
  }
  into.append(text.slice(last));
}
