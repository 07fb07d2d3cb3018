/** Which jobs the address names: `#job=ID`, or `#job=ID,ID` for two beside one another. */

const MAX_JOBS = 2;

/** @returns {string[]} */
export function jobsInAddress() {
  const named = new URLSearchParams(location.hash.slice(1)).get("job") ?? "";
  return named.split(",").filter((id) => /^[A-Za-z0-9_-]{1,64}$/.test(id)).slice(0, MAX_JOBS);
}

/** @param {string[]} jobIds */
export function putInAddress(jobIds) {
  history.replaceState(null, "", `#job=${jobIds.join(",")}`);
}
