import { describe, it } from "node:test";
import assert from "node:assert/strict";
import { mkdir, mkdtemp, rm, writeFile } from "node:fs/promises";
import { cpus, tmpdir, totalmem } from "node:os";
import { join } from "node:path";
import { createValidator } from "@bufbuild/protovalidate";
import { HostSchema } from "@clodei/proto/gen/clodei/v1/inventory";
import { readHost, readNumaNodes } from "./host.ts";

describe("the machine around the GPUs", () => {
  it("is read on this one, and fits the contract", async () => {
    const host = await readHost();
    assert.equal(createValidator().validate(HostSchema, host).kind, "valid");
    assert.equal(host.memoryMib, Math.floor(totalmem() / 1024 / 1024));
    assert.ok(host.cpuCount >= 1 && host.cpuCount <= cpus().length);
    assert.ok((host.cpuCores ?? 1) <= cpus().length);
    for (const { name } of host.networkInterfaces) assert.doesNotMatch(name, /^(lo|veth|docker|br-)/);
  });

  it("has the NUMA nodes that the kernel lists, and of each what it tells", async () => {
    const folder = await mkdtemp(join(tmpdir(), "clodei-numa-"));
    try {
      for (const name of ["node10", "node1", "node0", "power"]) await mkdir(join(folder, name));
      await writeFile(join(folder, "node0", "cpulist"), "0-47,96-143\n");
      await writeFile(join(folder, "node0", "meminfo"), "Node 0 MemTotal:       527988324 kB\nNode 0 MemFree: 1 kB\n");
      await writeFile(join(folder, "node1", "cpulist"), "48-95,144-191\n");
      await writeFile(join(folder, "node1", "meminfo"), "Node 1 MemTot");
      assert.deepEqual(
        (await readNumaNodes(folder)).map(({ index, cpus: list, memoryMib }) => [index, list, memoryMib]),
        [
          [0, "0-47,96-143", 515613],
          [1, "48-95,144-191", undefined],
          [10, "", undefined],
        ],
      );
      assert.deepEqual(await readNumaNodes(join(folder, "nowhere")), []);
    } finally {
      await rm(folder, { recursive: true });
    }
  });
});
