import { describe, it } from "node:test";
import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import { chmod, mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createValidator } from "@bufbuild/protovalidate";
import { parseSimulatedGpus } from "@clodei/proto/gpu-models";
import { GpuHealth, MigMode, NodeInventorySchema } from "@clodei/proto/gen/clodei/v1/inventory";
import { readGpus, simulateGpus } from "./gpu.ts";
import { readHost } from "./host.ts";
import { Inventory } from "./inventory.ts";
import { parseNvidiaSmi } from "./nvidia-smi.ts";
import type { GpuReadings } from "./nvidia-smi.ts";

interface Fields {
  readonly uuid?: string;
  readonly name?: string;
  readonly memory?: string;
  readonly mig?: string;
  readonly more?: string;
}

/** One device as the tool documents it, cut down to what is read. */
function gpuXml(fields: Fields = {}): string {
  const {
    uuid = "GPU-11111111-2222-3333-4444-555555555555",
    name = "NVIDIA H100 80GB HBM3",
    memory = "81559 MiB",
    mig = "Disabled",
    more = "",
  } = fields;
  return `<gpu id="00000000:1B:00.0"><product_name>${name}</product_name><mig_mode><current_mig>${mig}</current_mig></mig_mode>
    <uuid>${uuid}</uuid><pci><pci_bus_id>00000000:1B:00.0</pci_bus_id></pci>
    <fb_memory_usage><total>${memory}</total><used>12 MiB</used></fb_memory_usage>
    <utilization><gpu_util>7 %</gpu_util></utilization>${more}</gpu>`;
}

function documentOf(...gpus: readonly string[]): string {
  return `<?xml version="1.0" ?><!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v13.dtd"><nvidia_smi_log>
    <driver_version>580.65.06</driver_version><cuda_version>13.0</cuda_version>${gpus.join("")}</nvidia_smi_log>`;
}

function one(xml: string): GpuReadings["readings"][number] {
  const { readings } = parseNvidiaSmi(xml);
  assert.equal(readings.length, 1);
  const [reading] = readings;
  assert.ok(reading !== undefined);
  return reading;
}

describe("the output of nvidia-smi", () => {
  it("is read field by field", () => {
    const { gpu, utilizationPercent, memoryUsedMib } = one(documentOf(gpuXml()));
    assert.equal(gpu.uuid, "GPU-11111111-2222-3333-4444-555555555555");
    assert.deepEqual(
      [gpu.model, gpu.memoryMib, gpu.driverVersion, gpu.cudaVersion],
      ["H100-SXM", 81559, "580.65.06", "13.0"],
    );
    assert.deepEqual(
      [gpu.pciAddress, gpu.migMode, gpu.health],
      ["00000000:1B:00.0", MigMode.DISABLED, GpuHealth.HEALTHY],
    );
    assert.deepEqual([utilizationPercent, memoryUsedMib, gpu.simulated], [7, 12, false]);
  });

  it("costs one field where one field is not known", () => {
    for (const unknown of ["N/A", "[N/A]", "[Not Supported]", ""]) {
      const { gpu } = one(
        documentOf(gpuXml({ mig: unknown, more: `<performance_state>${unknown}</performance_state>` })),
      );
      assert.equal(gpu.memoryMib, 81559);
      assert.equal(gpu.health, GpuHealth.HEALTHY);
      assert.equal(
        gpu.migMode,
        unknown === ""
          ? MigMode.UNSPECIFIED
          : unknown === "N/A" || unknown === "[N/A]" || unknown === "[Not Supported]"
            ? MigMode.UNSUPPORTED
            : MigMode.UNSPECIFIED,
      );
    }
  });

  it("shows a device in trouble as not healthy, in the tool's own words", () => {
    const cases: [Fields, RegExp][] = [
      [{ memory: "ERR!" }, /memory: ERR!/],
      [{ memory: "[Unknown Error]" }, /Unknown Error/],
      [{ name: "[GPU is lost]" }, /GPU is lost/],
      [{ more: "<gpu_recovery_action>Reset</gpu_recovery_action>" }, /recovery action: Reset/],
      [{ more: "<remapped_rows><remapped_row_failure>Yes</remapped_row_failure></remapped_rows>" }, /remapping failed/],
      [
        { more: "<remapped_rows><remapped_row_pending>Yes</remapped_row_pending></remapped_rows>" },
        /waits for a reset/,
      ],
      [
        { more: "<ecc_errors><volatile><dram_uncorrectable>5</dram_uncorrectable></volatile></ecc_errors>" },
        /5 uncorrected/,
      ],
      [
        { more: "<ecc_errors><volatile><double_bit><total>2</total></double_bit></volatile></ecc_errors>" },
        /2 uncorrected/,
      ],
    ];
    for (const [fields, message] of cases) {
      const { gpu } = one(documentOf(gpuXml(fields)));
      assert.equal(gpu.health, GpuHealth.UNHEALTHY);
      assert.match(gpu.healthMessage, message);
    }
  });

  it("takes corrected and aggregate errors for what they are: the past", () => {
    const more =
      "<ecc_errors><volatile><dram_correctable>9</dram_correctable></volatile><aggregate><dram_uncorrectable>8</dram_uncorrectable></aggregate></ecc_errors>";
    assert.equal(one(documentOf(gpuXml({ more }))).gpu.health, GpuHealth.HEALTHY);
  });

  it("leaves out a device that has no name of its own, and says so", () => {
    for (const uuid of ["ERR!", "", "GPU-SIM-real", "GPU-a b"]) {
      const { readings, error } = parseNvidiaSmi(documentOf(gpuXml({ uuid }), gpuXml()));
      assert.equal(readings.length, 1);
      assert.notEqual(error, "");
    }
    assert.match(parseNvidiaSmi(documentOf(gpuXml(), gpuXml())).error, /twice/);
  });

  it("may be anything: that is an error and no crash", () => {
    for (const text of [
      "",
      "No devices were found",
      "<nvidia_smi_log>",
      "<a/>",
      "\0",
      documentOf(gpuXml()).slice(0, 300),
    ]) {
      const { readings, error } = parseNvidiaSmi(text);
      assert.deepEqual(readings, []);
      assert.notEqual(error, "");
    }
    assert.deepEqual(parseNvidiaSmi(documentOf()), { readings: [], error: "" });
  });
});

const samples = join(import.meta.dirname, "../../../../shared/data/gpu-samples");

interface Truth {
  readonly driver: string | null;
  readonly gpus: readonly {
    readonly uuid: string;
    readonly name: string;
    readonly bus_id: string;
    readonly mem_total_mib: number;
    readonly mig_mode: string | null;
    readonly gpu_util_pct: number | null;
  }[];
}

describe(
  "outputs of real machines",
  { skip: existsSync(join(samples, "truth.json")) ? false : "the samples are not here" },
  () => {
    it("read as an independent reader read them", async () => {
      const truth = JSON.parse(await readFile(join(samples, "truth.json"), "utf8")) as Record<string, Truth>;
      const migModes: Record<string, MigMode> = { Enabled: MigMode.ENABLED, Disabled: MigMode.DISABLED };
      let seen = 0;
      for (const [file, { driver, gpus }] of Object.entries(truth)) {
        const { readings, error } = parseNvidiaSmi(await readFile(join(samples, file), "utf8"));
        assert.equal(error, "", file);
        assert.deepEqual(
          readings.map(({ gpu }) => [gpu.uuid, gpu.productName, gpu.pciAddress, gpu.memoryMib, gpu.driverVersion]),
          gpus.map((gpu) => [gpu.uuid, gpu.name, gpu.bus_id, gpu.mem_total_mib, driver ?? ""]),
          file,
        );
        for (const [index, gpu] of gpus.entries()) {
          const reading = readings[index];
          assert.equal(reading?.utilizationPercent ?? null, gpu.gpu_util_pct, file);
          const mode = gpu.mig_mode === null ? undefined : migModes[gpu.mig_mode];
          if (mode !== undefined) assert.equal(reading?.gpu.migMode, mode, file);
        }
        seen += readings.length;
      }
      assert.ok(seen >= 17);
      const damaged = parseNvidiaSmi(await readFile(join(samples, "xml/nvidia-qx-gb200-ecc-injected.xml"), "utf8"));
      assert.deepEqual(
        damaged.readings.map(({ gpu }) => gpu.health),
        [GpuHealth.UNHEALTHY, GpuHealth.HEALTHY],
      );
    });
  },
);

async function withTool(script: string, work: (nvidiaSmi: string) => Promise<void>): Promise<void> {
  const folder = await mkdtemp(join(tmpdir(), "clodei-smi-"));
  try {
    const path = join(folder, "nvidia-smi");
    await writeFile(path, `#!/bin/sh\n${script}\n`);
    await chmod(path, 0o755);
    await work(path);
  } finally {
    await rm(folder, { recursive: true });
  }
}

const searchPath = "/usr/bin:/bin";

describe("the tool itself", () => {
  it("is absent on a node without GPUs", async () => {
    assert.deepEqual(await readGpus({ nvidiaSmi: "no-such-tool-anywhere", searchPath }), { readings: [], error: "" });
  });

  it("finds none, fails, or prints and fails: each is told apart", async () => {
    await withTool("echo 'No devices were found'; exit 6", async (nvidiaSmi) => {
      assert.deepEqual(await readGpus({ nvidiaSmi, searchPath }), { readings: [], error: "" });
    });
    await withTool("echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18", async (nvidiaSmi) => {
      assert.match((await readGpus({ nvidiaSmi, searchPath })).error, /exit 18.*version mismatch/);
    });
    await withTool(`cat <<'X'\n${documentOf(gpuXml())}\nX\necho 'one GPU is lost' >&2; exit 15`, async (nvidiaSmi) => {
      const { readings, error } = await readGpus({ nvidiaSmi, searchPath });
      assert.equal(readings.length, 1);
      assert.match(error, /one GPU is lost/);
    });
  });

  it("hangs: the answer comes at the deadline", async () => {
    await withTool("exec sleep 30", async (nvidiaSmi) => {
      const begin = performance.now();
      const { error } = await readGpus({ nvidiaSmi, searchPath, timeoutMs: 200 });
      assert.match(error, /did not answer/);
      assert.ok(performance.now() - begin < 5000);
    });
  });
});

describe("simulated GPUs", () => {
  it("say what they are, are the same after a restart, and are never another node's", () => {
    const models = parseSimulatedGpus("2xH100-SXM,1xL40S");
    const names = (node: string) => simulateGpus(models, node).readings.map(({ gpu }) => gpu.uuid);
    assert.deepEqual(names("a"), names("a"));
    assert.equal(new Set([...names("a"), ...names("b")]).size, 6);
    for (const { gpu } of simulateGpus(models, "a").readings) {
      assert.ok(gpu.simulated);
      assert.match(gpu.uuid, /^GPU-SIM-[0-9a-f]{32}$/);
    }
  });
});

describe("the inventory", () => {
  it("fits the contract, and tells of a change once", async () => {
    let readings = simulateGpus(parseSimulatedGpus("1xH100-SXM"), "a");
    const inventory = await Inventory.open({
      readGpus: async () => readings,
      host: await readHost(),
      workspaceFolder: "/",
      dockerVersion: () => "20.10",
    });
    const result = createValidator().validate(NodeInventorySchema, inventory.current());
    assert.equal(result.kind, "valid");
    let changes = 0;
    using _listener = inventory.onChange(() => (changes += 1));
    await inventory.refresh();
    assert.equal(changes, 0);
    // The tool fails: the device that was there is not forgotten, and not offered.
    readings = { readings: [], error: "driver mismatch" };
    await inventory.refresh();
    assert.equal(changes, 1);
    const { gpus, gpuError } = inventory.current();
    assert.deepEqual(
      [gpus[0]?.health, gpus[0]?.healthMessage, gpuError],
      [GpuHealth.UNHEALTHY, "driver mismatch", "driver mismatch"],
    );
    assert.equal(inventory.gpuStatuses()[0]?.health, GpuHealth.UNHEALTHY);
  });
});
