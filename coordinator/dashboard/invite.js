"use strict";
// The invitation, for who opened the address that the coordinator printed: its fragment is the key.
async function invite() {
  const key = location.hash.slice(1);
  if (!key) return;
  const response = await fetch("invitation", {headers: {authorization: `Bearer ${key}`}});
  if (!response.ok) return;
  const {line, svg} = await response.json();
  say("join", line);
  $("qr").replaceChildren(document.importNode(new DOMParser().parseFromString(svg, "text/html").querySelector("svg"), true));
  $("qr").firstChild.setAttribute("aria-label", "The line as a QR code");
  $("invite").hidden = false;
}
addEventListener("hashchange", invite);
invite().catch(() => {});
