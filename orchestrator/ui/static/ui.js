// Keeps a page as new as the server's. Everything is there without it, as of the moment the page was loaded.
"use strict";
(() => {
  const body = document.body;
  const said = document.getElementById("connection");
  const say = (text) => { if (said && said.textContent !== text) said.textContent = text; };

  // ---- sorting: a table's heads become buttons; the order is kept when its rows are replaced
  const sorted = new Map();
  const value = (row, column) => {
    const cell = row.cells[column];
    const text = cell ? cell.dataset.sort ?? cell.textContent.trim() : "";
    const number = Number.parseFloat(text.replaceAll(",", ""));
    return Number.isNaN(number) ? text.toLowerCase() : number;
  };
  const compare = (a, b) => typeof a === typeof b ? (a < b ? -1 : a > b ? 1 : 0) : typeof a === "number" ? -1 : 1;
  const order = (table) => {
    const chosen = sorted.get(table.id);
    if (!chosen) return;
    const rows = [...table.tBodies[0].rows];
    rows.sort((a, b) => chosen.sign * compare(value(a, chosen.column), value(b, chosen.column)));
    table.tBodies[0].append(...rows);
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      if (column === chosen.column) head.setAttribute("aria-sort", chosen.sign > 0 ? "ascending" : "descending");
      else head.removeAttribute("aria-sort");
    });
  };
  const sortable = (within) => {
    for (const table of within.querySelectorAll("table.sortable")) {
      [...table.tHead.rows[0].cells].forEach((head, column) => {
        const button = document.createElement("button");
        button.type = "button";
        button.id = `${table.id}-sort-${column}`;
        button.textContent = head.textContent;
        button.addEventListener("click", () => {
          const before = sorted.get(table.id);
          sorted.set(table.id, { column, sign: before && before.column === column ? -before.sign : 1 });
          order(table);
        });
        head.replaceChildren(button);
      });
      order(table);
    }
  };

  // ---- replacing what has changed, and leaving the visitor where they were
  const key = (element) => element.id ? `#${CSS.escape(element.id)}`
    : element.getAttribute("href") ? `a[href="${CSS.escape(element.getAttribute("href"))}"]`
    : element.name ? `[name="${CSS.escape(element.name)}"][value="${CSS.escape(element.value)}"]` : null;
  const replace = (old, now) => {
    for (const open of old.querySelectorAll("details[id][open]")) now.querySelector(`#${open.id}`)?.setAttribute("open", "");
    for (const box of old.querySelectorAll("input:checked")) {
      const same = now.querySelector(key(box));
      if (same) same.checked = true;
    }
    const places = [...old.querySelectorAll(".scroll, .log")].map((element) => [element.scrollLeft, element.scrollTop]);
    const focused = old.contains(document.activeElement) ? key(document.activeElement) : null;
    const region = old.contains(document.activeElement) ? [...old.querySelectorAll("[tabindex]")].indexOf(document.activeElement) : -1;
    old.replaceWith(now);
    sortable(now);
    [...now.querySelectorAll(".scroll, .log")].forEach((element, index) => {
      if (places[index]) [element.scrollLeft, element.scrollTop] = places[index];
    });
    const again = focused ? now.querySelector(focused) : region >= 0 ? now.querySelectorAll("[tabindex]")[region] : null;
    again?.focus({ preventScroll: true });
  };
  const shown = new Map([...document.querySelectorAll("[data-live]")].map((part) => [part.id, part.outerHTML]));
  let busy = false, again = false;
  const refresh = async () => {
    if (busy) { again = true; return; }
    busy = true;
    try {
      const answer = await fetch(location.href, { credentials: "same-origin" });
      if (!answer.ok) { say("the server does not answer as it should; reload the page"); return; }
      const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
      document.title = fresh.title;
      document.documentElement.dataset.mark = fresh.documentElement.dataset.mark;
      for (const now of fresh.querySelectorAll("[data-live]")) {
        const old = document.getElementById(now.id);
        if (!old || shown.get(now.id) === now.outerHTML) continue;
        shown.set(now.id, now.outerHTML);
        replace(old, document.adoptNode(now));
      }
    } catch { say("the server cannot be reached"); } finally {
      busy = false;
      if (again) { again = false; refresh(); }
    }
  };

  // ---- being told
  let source = null, timer = null;
  const listen = () => {
    clearTimeout(timer);
    source?.close();
    source = null;
    if (!body.dataset.events || document.hidden) return;
    source = new EventSource(`${body.dataset.events}&since=${document.documentElement.dataset.mark}`);
    source.onopen = () => say("live");
    source.onmessage = refresh;
    source.onerror = () => {
      say("not connected; trying again");
      if (source && source.readyState === EventSource.CLOSED) timer = setTimeout(() => { refresh(); listen(); }, 5000);
    };
  };
  document.addEventListener("visibilitychange", listen);

  // ---- the filter of a sweep's trials acts while one types
  const filter = document.getElementById("filter");
  if (filter) {
    let wait = null;
    const apply = () => {
      const address = new URL(location.href);
      if (filter.value) address.searchParams.set("filter", filter.value); else address.searchParams.delete("filter");
      history.replaceState(null, "", address);
      refresh();
    };
    filter.addEventListener("input", () => { clearTimeout(wait); wait = setTimeout(apply, 250); });
    filter.form.addEventListener("submit", (event) => { event.preventDefault(); clearTimeout(wait); apply(); });
  }

  sortable(document);
  listen();
})();
