/** The API key, kept for this tab alone: other tabs ask again, and closing this one forgets it. */

const NAME = "dycoke.key";

/** @returns {string | null} */
export function storedKey() {
  return sessionStorage.getItem(NAME);
}

/** @param {string} key */
export function storeKey(key) {
  sessionStorage.setItem(NAME, key);
}

export function forgetKey() {
  sessionStorage.removeItem(NAME);
}
