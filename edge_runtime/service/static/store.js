// The chats, kept in this browser and nowhere else: one entry of its local storage each.

const MEMORY = {
  getItem(key) { return this[key] ?? null; },
  setItem(key, value) { this[key] = value; },
  removeItem(key) { delete this[key]; },
};

/** A storage of the browser; if it forbids them, one that lasts as long as the page. */
function openStorage(name) {
  try {
    return window[name] ?? Object.create(MEMORY);
  } catch {
    return Object.create(MEMORY);
  }
}

export const storage = openStorage("localStorage");
export const tabStorage = openStorage("sessionStorage");

const PREFIX = "flexspec-chat-";
const SETTINGS = "flexspec-settings";
// The oldest are dropped.
const MAX_CHATS = 100;

function read(key) {
  try {
    return JSON.parse(storage.getItem(key));
  } catch {
    return null;
  }
}

/** All chats, the newest first. */
export function listChats() {
  const keys = Object.keys(storage).filter((key) => key.startsWith(PREFIX));
  return keys.map(read).filter((chat) => chat?.messages).sort((a, b) => b.updated - a.updated);
}

/** Save a chat, or forget one without messages. If the storage is full, the oldest chats make room. */
export function saveChat(chat) {
  if (!chat.messages.length) return removeChat(chat);
  chat.updated = Date.now();
  const oldest = listChats().filter(({ id }) => id !== chat.id).reverse();
  while (oldest.length >= MAX_CHATS) removeChat(oldest.shift());
  for (;;) {
    try {
      return storage.setItem(PREFIX + chat.id, JSON.stringify(chat));
    } catch {
      if (!oldest.length) return undefined;
      removeChat(oldest.shift());
    }
  }
}

export const removeChat = ({ id }) => storage.removeItem(PREFIX + id);

export const readSettings = () => read(SETTINGS) ?? {};

export const saveSettings = (settings) => storage.setItem(SETTINGS, JSON.stringify(settings));

/** A new chat with these settings. */
export const makeChat = (settings) => ({ id: randomNumber().toString(36), updated: Date.now(), settings, messages: [] });

/** A random integer of 52 bits; `crypto.randomUUID` exists only over TLS. */
export function randomNumber() {
  const [high, low] = crypto.getRandomValues(new Uint32Array(2));
  return (high >>> 12) * 2 ** 32 + low;
}
