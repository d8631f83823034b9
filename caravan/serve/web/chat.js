// The page: what was said, the composer, the settings. Model text reaches the document only through markdown.js.

import { render } from "./markdown.js";
import { Refused, answer, models, pageSettings, sendFeedback, useKey } from "./talk.js";
import { label, word } from "./words.js";

const $ = (id) => document.getElementById(id);
const REGENERATE_TEMPERATURE = 0.8; // at 0 the second answer would be the first again

/** Turns in order: {role, content, id, model, complete}. */
let turns = [];
let running = null; // AbortController of the answer being written
let open = null; // {settle} of two answers waiting for a choice
let feedbackOn = false;
const settings = { temperature: null, maxTokens: null, system: "", ...stored() };

function stored() {
  try {
    return JSON.parse(localStorage.getItem("caravan.settings")) || {};
  } catch {
    return {}; // written by an older page: start anew
  }
}

// ---- small pieces of page ----

function make(name, className, ...children) {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

function icon(name, className = "") {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  if (className) svg.setAttribute("class", className);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

function iconButton(name, title, act, className = "") {
  const button = make("button", `icon ${className}`, icon(name));
  button.type = "button";
  button.title = title;
  button.setAttribute("aria-label", title);
  button.addEventListener("click", () => act(button));
  return button;
}

function plainButton(text, act) {
  const button = make("button", "plain", text);
  button.type = "button";
  button.addEventListener("click", act);
  return button;
}

const nearEnd = () => $("scroll").scrollHeight - $("scroll").scrollTop - $("scroll").clientHeight < 120;
const toEnd = () => ($("scroll").scrollTop = $("scroll").scrollHeight);

function announce(text) {
  $("announce").textContent = text;
}

function aside(text) {
  $("log").append(make("p", "aside", text));
}

// ---- asking ----

function request(history, temperature) {
  const system = settings.system.trim();
  const messages = history.map(({ role, content }) => ({ role, content }));
  return {
    model: $("model").value,
    messages: system ? [{ role: "system", content: system }, ...messages] : messages,
    temperature,
    max_tokens: settings.maxTokens,
  };
}

/** Stream into `place`; resolves to {content, id, reason}. Leaves out the oldest turns when they do not fit. */
async function stream(history, temperature, place, stopper) {
  let content = "";
  let drawn = true;
  const draw = () => {
    const follow = nearEnd();
    place.replaceChildren(render(content));
    drawn = true;
    if (follow) toEnd();
  };
  const onText = (piece) => {
    content += piece;
    if (drawn) requestAnimationFrame(draw);
    drawn = false;
  };
  place.classList.add("writing");
  try {
    for (let kept = history, told = false; ; ) {
      try {
        const { id, reason } = await answer(request(kept, temperature), stopper.signal, onText);
        return { content, id, reason };
      } catch (problem) {
        if (problem.name === "AbortError") return { content, id: "", reason: "stopped" };
        if (problem.code !== "context_length_exceeded" || kept.length < 3) throw problem;
        kept = kept.slice(2);
        if (!told) place.closest(".said").before(make("p", "aside", word.forgot));
        told = true;
      }
    }
  } finally {
    place.classList.remove("writing");
    draw();
  }
}

function explain(problem) {
  if (problem instanceof Refused && problem.status === 401) return word.needKey;
  return problem instanceof Refused ? problem.message : word.offline;
}

function begin() {
  running = new AbortController();
  $("stop").hidden = false;
  $("send").hidden = true;
  for (const button of document.querySelectorAll(".again")) button.remove();
  return running;
}

function end() {
  running = null;
  $("stop").hidden = true;
  $("send").hidden = false;
}

async function ask(text) {
  if (running) return;
  open?.settle();
  $("welcome").hidden = true;
  turns.push({ role: "user", content: text });
  const mine = make("div", "text");
  mine.textContent = text;
  $("log").append(make("div", "said user", mine));
  const place = make("div", "text");
  const said = make("div", "said assistant", icon("mark", "mark"), place);
  $("log").append(said);
  toEnd();
  const stopper = begin();
  try {
    const model = $("model").value;
    const { content, id, reason } = await stream(turns, settings.temperature, place, stopper);
    const turn = { role: "assistant", content, id, model, reason };
    turns.push(turn);
    said.append(tools(turn, said, place));
    announce(content);
  } catch (problem) {
    turns.pop(); // the question stays visible, and can be asked again
    const told = make("div", "problem");
    told.textContent = word.sorry + explain(problem);
    told.setAttribute("role", "alert");
    place.replaceWith(told);
    $("question").value ||= text;
    grow();
  } finally {
    end();
    $("question").focus();
  }
}

// ---- under an answer ----

function tools(turn, said, place) {
  const bar = make("div", "tools");
  bar.append(
    iconButton("copy", word.copy, async (button) => {
      await navigator.clipboard.writeText(turn.content);
      button.replaceChildren(icon("check"));
      announce(word.copied);
      setTimeout(() => button.replaceChildren(icon("copy")), 1500);
    }),
  );
  if (feedbackOn && turn.id) bar.append(...thumbs(turn, bar));
  if (turn.content || turn.reason === "stopped") {
    bar.append(iconButton("again", word.again, () => regenerate(turn, said, place), "again"));
  }
  const why = { stopped: word.stopped, length: word.tooLong }[turn.reason];
  if (why) bar.append(make("span", "why", why));
  return bar;
}

function thumbs(turn, bar) {
  const buttons = [
    ["up", word.up, 1],
    ["down", word.down, -1],
  ].map(([name, title, vote]) => {
    const button = iconButton(name, title, () => press(button, vote), name);
    button.setAttribute("aria-pressed", "false");
    return button;
  });
  async function press(button, vote) {
    const on = button.getAttribute("aria-pressed") !== "true";
    try {
      await sendFeedback({ kind: "vote", id: turn.id, vote: on ? vote : 0 });
      for (const other of buttons) other.setAttribute("aria-pressed", String(other === button && on));
      announce(word.thanks);
    } catch (problem) {
      note(bar, word.sorry + explain(problem));
    }
  }
  return buttons;
}

function note(bar, text) {
  bar.querySelector(".why")?.remove();
  bar.append(make("span", "why", text));
}

/** A second answer beside the first; picking one is a preference. */
async function regenerate(turn, said, place) {
  if (running || turns.at(-1) !== turn) return;
  const history = turns.slice(0, -1);
  const second = make("div", "text");
  const pair = make("div", "pair");
  const box = make("div", "two", pair);
  const shown = make("div", "text");
  shown.replaceChildren(render(turn.content));
  const cards = [shown, second].map((text, n) => {
    const card = make("article", "", text);
    card.setAttribute("aria-label", n ? word.second : word.first);
    pair.append(card);
    return card;
  });
  const bar = said.querySelector(".tools");
  bar.hidden = place.hidden = true;
  said.append(box);
  if (nearEnd()) toEnd();
  const back = () => {
    box.remove();
    bar.hidden = place.hidden = false;
    if (!bar.querySelector(".again")) {
      bar.append(iconButton("again", word.again, () => regenerate(turn, said, place), "again"));
    }
  };
  const stopper = begin();
  try {
    const warmer = Math.max(settings.temperature, REGENERATE_TEMPERATURE);
    const model = $("model").value;
    const { content, id, reason } = await stream(history, warmer, second, stopper);
    if (reason === "stopped") return back();
    offer({ turn, other: { role: "assistant", content, id, model, reason }, box, cards, said, place, bar, back });
    announce(content);
  } catch (problem) {
    back();
    note(bar, word.sorry + explain(problem));
  } finally {
    end();
  }
}

function offer({ turn, other, box, cards, said, place, bar, back }) {
  const settle = () => {
    open = null;
    back();
  };
  open = { settle };
  const pick = async (chosen, rejected, tie) => {
    open = null;
    box.remove();
    place.hidden = false;
    place.replaceChildren(render(chosen.content));
    turns[turns.length - 1] = chosen;
    const fresh = tools(chosen, said, place);
    bar.replaceWith(fresh);
    if (!feedbackOn || !turn.id || !other.id) return;
    try {
      await sendFeedback({ kind: "choice", chosen: chosen.id, rejected: rejected.id, tie });
      note(fresh, word.noted);
      announce(word.noted);
    } catch (problem) {
      note(fresh, word.sorry + explain(problem));
    }
  };
  box.prepend(make("p", "", word.whichBetter));
  cards[0].append(plainButton(word.better, () => pick(turn, other, false)));
  cards[1].append(plainButton(word.better, () => pick(other, turn, false)));
  box.append(make("p", "row", plainButton(word.same, () => pick(turn, other, true))));
  box.scrollIntoView({ block: "nearest" });
}

// ---- composer, settings ----

function grow() {
  const box = $("question");
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight}px`;
  $("send").disabled = !box.value.trim();
}

function submit() {
  const text = $("question").value.trim();
  if (!text || running) return;
  $("question").value = "";
  grow();
  ask(text);
}

function fresh() {
  running?.abort();
  open = null;
  turns = [];
  $("log").replaceChildren();
  $("welcome").hidden = false;
  $("question").focus();
}

function showTemperature() {
  $("temperature-shown").textContent = Number($("temperature").value).toFixed(1);
}

function openSettings() {
  $("temperature").value = settings.temperature;
  $("max-tokens").value = settings.maxTokens;
  $("system").value = settings.system;
  showTemperature();
  $("settings").showModal();
}

function keepSettings() {
  settings.temperature = Number($("temperature").value);
  settings.maxTokens = Math.max(1, Math.round(Number($("max-tokens").value)) || 1);
  settings.system = $("system").value;
  localStorage.setItem("caravan.settings", JSON.stringify(settings));
  if ($("key").value) {
    useKey($("key").value);
    $("key").value = "";
    loadModels();
  }
}

async function loadModels() {
  let list;
  try {
    list = await models();
  } catch (problem) {
    $("log").replaceChildren();
    return aside(word.sorry + explain(problem));
  }
  $("log").querySelectorAll(".aside").forEach((old) => old.remove());
  $("model").replaceChildren(...list.map(({ id }) => new Option(id, id)));
  document.querySelector(".picker").hidden = list.length < 2;
  $("model-name").textContent = list.length < 2 ? list[0].id : "";
  settings.temperature ??= list[0].defaults.temperature;
  settings.maxTokens ??= list[0].defaults.max_tokens;
}

function listen() {
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  $("question").addEventListener("input", grow);
  $("question").addEventListener("keydown", (event) => {
    // While an input method composes (Chinese, Japanese), Enter belongs to it.
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      submit();
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && running) running.abort();
  });
  $("stop").addEventListener("click", () => running?.abort());
  $("new").addEventListener("click", fresh);
  $("open-settings").addEventListener("click", openSettings);
  $("temperature").addEventListener("input", showTemperature);
  $("settings").addEventListener("close", keepSettings);
}

async function start() {
  label(document);
  $("question").placeholder = word.placeholder;
  listen();
  const page = await pageSettings();
  feedbackOn = page.feedback;
  $("key-row").hidden = !page.needs_key;
  const examples = page.examples.length ? page.examples : word.examples;
  $("examples").replaceChildren(...examples.map((text) => {
    const button = plainButton(text, () => ask(text));
    button.className = "example";
    return make("li", "", button);
  }));
  await loadModels();
  grow();
}

start();
