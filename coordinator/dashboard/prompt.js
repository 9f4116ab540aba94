"use strict";
// The prompt box: the answer comes as JSON lines, a piece each, and is shown as text nodes.
let asking = null, asked = 0;

async function ask(event) {
  event.preventDefault();
  if (asking) return asking.abort();
  const prompt = $("prompt").value || $("prompt").placeholder, spoke = new Map();
  asking = new AbortController();
  fill("answer", make("span", {class: "asked", text: prompt}));
  fill("spoke");
  say("asked", "The model is being loaded ...");
  say("go", "Stop");
  try {
    const response = await fetch("prompt", {method: "POST", headers: {"content-type": "application/json"}, signal: asking.signal,
      body: JSON.stringify({prompt, seed: asked++})});
    if (!response.ok) throw new Error((await response.text()).trim());
    let rest = "";
    for (const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();;) {
      const {done, value} = await reader.read();
      const lines = (rest + (value || "")).split("\n");
      rest = lines.pop();
      for (const line of lines) hear(JSON.parse(line), spoke);
      if (done) break;
    }
  } catch (error) {
    say("asked", error.name === "AbortError" ? "Stopped." : error instanceof TypeError ? "The coordinator does not answer." : error.message);
  }
  asking = null;
  say("go", "Go on");
}
function hear(line, spoke) {
  if (line.error) return say("asked", line.error);
  if (!("text" in line)) return say("asked", (line.tokens ? plural(line.tokens, "token") : "The model ends the text here") +
    (line.left_out ? `; the first ${plural(line.left_out, "token")} of the text had no room in the model's context` : "") + ".");
  const span = make("span", {class: "said", title: `expert ${line.expert}`, "data-expert": line.expert, text: line.text});
  span.style.setProperty("--who", colour(line.expert));
  $("answer").append(span);
  say("asked", "");
  spoke.set(line.expert, (spoke.get(line.expert) || 0) + 1);
  legend(spoke);
}
function legend(spoke) {
  const all = [...spoke.values()].reduce((sum, count) => sum + count, 0), topic = new Map((state.topics || []).map(t => [t.partition, t.words]));
  const arrived = new Set((state.experts || []).filter(e => e.shows === "accepted").map(e => e.partition));
  fill("spoke", ...[...spoke].sort((a, b) => b[1] - a[1]).map(([expert, count]) => {
    const swatch = make("i"), words = (topic.get(expert) || []).slice(0, 4).join(", ");
    swatch.style.background = colour(expert);
    return make("span", {"data-expert": expert}, swatch, `expert ${expert}${words ? ` (${words})` : ""}: ${number(100 * count / all)} %` +
      (arrived.has(expert) ? "" : ", the shared FFN until it arrives"));
  }));
}
function speakable() {
  const ready = (state.experts || []).some(expert => expert.shows === "accepted");
  $("prompt").disabled = $("go").disabled = !ready && !asking;
  if (!asking && !$("answer").textContent) say("asked", ready ? "" : "The model can be asked when the first shard is accepted.");
}
$("ask").addEventListener("submit", ask);
$("prompt").addEventListener("keydown", event => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask").requestSubmit() });
RENDER.experts.push(speakable);
speakable();
