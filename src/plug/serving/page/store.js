// Works in IndexedDB: they survive a reload and a browser's restart.

let opening;

function open() {
  opening ??= new Promise((resolve, reject) => {
    const request = indexedDB.open("plug-writer", 1);
    request.onupgradeneeded = () => request.result.createObjectStore("works", { keyPath: "id" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  return opening;
}

async function run(mode, act) {
  const database = await open();
  return new Promise((resolve, reject) => {
    const transaction = database.transaction("works", mode);
    const request = act(transaction.objectStore("works"));
    transaction.oncomplete = () => resolve(request.result);
    transaction.onerror = transaction.onabort = () => reject(transaction.error ?? request.error);
  });
}

// Whether it was saved: not where what is kept is not what was `known` (its `changed`), since another tab saved it.
export async function save(work, known) {
  const isOurs = (kept) => !kept || kept.changed === known;
  return isOurs(await run("readwrite", (works) => {
    const request = works.get(work.id);
    request.onsuccess = () => isOurs(request.result) && works.put(work);
    return request;
  }));
}
export const remove = (id) => run("readwrite", (works) => works.delete(id));
export const all = () => run("readonly", (works) => works.getAll());

// Small settings of the page. A browser may forbid storage: then they last as long as the page.
const memory = {};
export function keep(name, value, area = "localStorage") {
  memory[name] = value;
  try { globalThis[area].setItem(`plug-${name}`, value); } catch { /* kept in memory */ }
}
export function kept(name, area = "localStorage") {
  try { return globalThis[area].getItem(`plug-${name}`) ?? memory[name] ?? null; } catch { return memory[name] ?? null; }
}
