// Preloaded into each test file's process: ends it, and what it started, once the test runner is gone.
import { watchParent } from "../setup/child.mjs";

/** What a test's own clean-up gets before the whole process group is killed. */
const graceMs = 5000;

watchParent(() => {
  // Each test file leads a process group of its own.
  process.kill(-process.pid, "SIGTERM");
  setTimeout(() => process.kill(-process.pid, "SIGKILL"), graceMs).unref();
});
