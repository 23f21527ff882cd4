// Preloaded into each program that a test starts: ends it in order once the test's process is gone, so that a test that
// was killed leaves no control plane and no agent behind.
import { watchParent } from "../../tools/setup/child.mjs";

watchParent(() => process.kill(process.pid, "SIGTERM"));
