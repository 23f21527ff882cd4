import assert from "node:assert/strict";
import { once } from "node:events";
import { mkdtemp, readFile, rm } from "node:fs/promises";
import { createServer } from "node:http";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { test } from "node:test";
import { createClient } from "@clodei/sdk";
import { startControlPlane } from "./control-plane.ts";
import { provideKeys } from "./keys.ts";

const root = dirname(dirname(import.meta.dirname));

const options = process.platform === "linux" ? {} : { skip: "needs Linux: another program's parameters" };

for (const listener of ["public", "operations"]) {
  test(
    `the ${listener} port may be taken before the control plane listens: it listens elsewhere`,
    options,
    async () => {
      const dataFolder = await mkdtemp(join(tmpdir(), "clodei-control-plane-"));
      await using stack = new AsyncDisposableStack();
      stack.defer(() => rm(dataFolder, { recursive: true, force: true }));
      // Takes every request for a good one, as another control plane's answer to /readyz would be.
      const other = createServer((_request, response) => response.end());
      stack.defer(() => void other.close());
      const places = { root, dataFolder };
      const plane = await startControlPlane(
        places,
        async (child) => {
          stack.defer(() => child.stop());
          if (other.listening) return;
          const parameters = (await readFile(`/proc/${child.pid}/cmdline`, "utf8")).split("\0");
          other.listen(Number(parameters[parameters.indexOf(`--${listener}-port`) + 1]), "127.0.0.1");
          await once(other, "listening");
        },
        new AbortController().signal,
      );
      const answer = await fetch(`${plane.operationsUrl}/metrics`);
      assert.match(await answer.text(), /^# HELP clodei_/mu);
      const { operatorKey } = await provideKeys(places, plane);
      using operator = createClient({ endpoint: plane.publicUrl, apiKey: operatorKey, ca: plane.ca });
      assert.deepEqual(await operator.nodes.list().toArray(), []);
    },
  );
}
