import { describe, it } from "node:test";
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { once } from "node:events";
import { connect } from "node:net";
import type { Socket } from "node:net";
import { setImmediate, setTimeout as sleep } from "node:timers/promises";
import { dial } from "./dial.ts";

/** Listens, says where, and takes two connections. */
const listener = `
  const server = require("node:net").createServer();
  server.listen({ port: 0, host: "127.0.0.1", backlog: 1 }, () => console.log(server.address().port));
`;

describe("dial", { timeout: 60_000 }, () => {
  // Linux drops the packets of whoever comes while a listener's queue is full: to them its host is silent.
  const skip = process.platform === "linux" ? false : "needs Linux";

  it("leaves a host that is silent after 2 s, and says so", { skip }, async () => {
    const child = spawn(process.execPath, ["-e", listener], { stdio: ["ignore", "pipe", "inherit"] });
    let waiting: Socket[] = [];
    try {
      const [chunk] = (await once(child.stdout, "data")) as [Buffer];
      const port = Number(chunk.toString());
      child.kill("SIGSTOP");
      // More than find a place. The kernel takes them in before we go on.
      waiting = Array.from({ length: 4 }, () => connect(port, "127.0.0.1"));
      await setImmediate();
      const socket = dial(new URL(`https://127.0.0.1:${port}`), {});
      await assert.rejects(once(socket, "secureConnect"), /no connection to 127\.0\.0\.1 within 2000 ms/);
    } finally {
      for (const socket of waiting) socket.destroy();
      child.kill("SIGKILL");
    }
  });

  it("leaves time to a host that took the connection and is slow with TLS", { skip }, async () => {
    const child = spawn(process.execPath, ["-e", listener], { stdio: ["ignore", "pipe", "inherit"] });
    try {
      const [chunk] = (await once(child.stdout, "data")) as [Buffer];
      const socket = dial(new URL(`https://127.0.0.1:${Number(chunk.toString())}`), {});
      await once(socket, "connect");
      await sleep(2_500);
      assert.equal(socket.destroyed, false);
      socket.destroy();
    } finally {
      child.kill("SIGKILL");
    }
  });
});
