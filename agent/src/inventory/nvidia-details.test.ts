import { describe, it } from "node:test";
import assert from "node:assert/strict";
import { toJson } from "@bufbuild/protobuf";
import { createValidator } from "@bufbuild/protovalidate";
import { GpuHealth, GpuSchema } from "@clodei/proto/gen/clodei/v1/inventory";
import { parseNvidiaSmi } from "./nvidia-smi.ts";
import { parseTopology } from "./nvidia-topology.ts";

// Devices as the tool's documentation describes them, one for each way in which it wrote its document over the years.

/** From driver 530 on (nvsmi_device_v12 and v13). */
const hopper = `<gpu id="00000000:1B:00.0">
  <product_name>NVIDIA H100 80GB HBM3</product_name>
  <persistence_mode>Enabled</persistence_mode>
  <mig_mode><current_mig>Enabled</current_mig><pending_mig>Enabled</pending_mig></mig_mode>
  <mig_devices>
    <mig_device><index>0</index><gpu_instance_id>1</gpu_instance_id><compute_instance_id>0</compute_instance_id>
      <device_attributes><shared><multiprocessor_count>60</multiprocessor_count></shared></device_attributes>
      <fb_memory_usage><total>40448 MiB</total></fb_memory_usage></mig_device>
    <mig_device><index>1</index><gpu_instance_id>N/A</gpu_instance_id></mig_device>
    <mig_device><index>ERR!</index></mig_device>
  </mig_devices>
  <serial>1650000000001</serial>
  <uuid>GPU-hopper</uuid>
  <gpu_reset_status><reset_required>No</reset_required></gpu_reset_status>
  <clocks_event_reasons>
    <clocks_event_reason_gpu_idle>Active</clocks_event_reason_gpu_idle>
    <clocks_event_reason_sw_power_cap>Active</clocks_event_reason_sw_power_cap>
    <clocks_event_reason_hw_slowdown>Not Active</clocks_event_reason_hw_slowdown>
  </clocks_event_reasons>
  <fb_memory_usage><total>81559 MiB</total><used>1024 MiB</used></fb_memory_usage>
  <compute_mode>Exclusive_Process</compute_mode>
  <performance_state>P0</performance_state>
  <utilization><gpu_util>98 %</gpu_util><memory_util>40 %</memory_util></utilization>
  <ecc_errors>
    <volatile><sram_correctable>1</sram_correctable><sram_uncorrectable_parity>0</sram_uncorrectable_parity>
      <sram_uncorrectable_secded>0</sram_uncorrectable_secded><dram_correctable>2</dram_correctable>
      <dram_uncorrectable>0</dram_uncorrectable></volatile>
    <aggregate><sram_correctable>10</sram_correctable><sram_uncorrectable_parity>3</sram_uncorrectable_parity>
      <sram_uncorrectable_secded>4</sram_uncorrectable_secded><dram_correctable>6</dram_correctable>
      <dram_uncorrectable>5</dram_uncorrectable></aggregate>
  </ecc_errors>
  <retired_pages><pending_retirement>N/A</pending_retirement></retired_pages>
  <remapped_rows><remapped_row_corr>7</remapped_row_corr><remapped_row_unc>0</remapped_row_unc>
    <remapped_row_pending>No</remapped_row_pending><remapped_row_failure>No</remapped_row_failure></remapped_rows>
  <temperature><gpu_temp>41 C</gpu_temp><memory_temp>52 C</memory_temp></temperature>
  <gpu_power_readings><instant_power_draw>311.25 W</instant_power_draw>
    <current_power_limit>700.00 W</current_power_limit></gpu_power_readings>
  <clocks><sm_clock>1980 MHz</sm_clock><mem_clock>2619 MHz</mem_clock></clocks>
  <processes><process_info><pid>4242</pid><type>C</type><process_name>/secret/of/a/customer</process_name>
    <used_memory>1000 MiB</used_memory></process_info></processes>
</gpu>`;

/** Until driver 510 (nvsmi_device_v10 and v11). */
const volta = `<gpu id="00000000:3B:00.0">
  <product_name>Tesla V100-SXM2-32GB</product_name>
  <persistence_mode>Disabled</persistence_mode>
  <serial>N/A</serial>
  <uuid>GPU-volta</uuid>
  <clocks_throttle_reasons>
    <clocks_throttle_reason_hw_thermal_slowdown>Active</clocks_throttle_reason_hw_thermal_slowdown>
  </clocks_throttle_reasons>
  <fb_memory_usage><total>32510 MiB</total><used>N/A</used></fb_memory_usage>
  <ecc_errors>
    <volatile><single_bit><device_memory>4</device_memory><total>4</total></single_bit>
      <double_bit><device_memory>0</device_memory><total>0</total></double_bit></volatile>
    <aggregate><single_bit><total>N/A</total></single_bit><double_bit><total>2</total></double_bit></aggregate>
  </ecc_errors>
  <retired_pages>
    <multiple_single_bit_retirement><retired_count>3</retired_count></multiple_single_bit_retirement>
    <double_bit_retirement><retired_count>1</retired_count></double_bit_retirement>
    <pending_blacklist>No</pending_blacklist>
  </retired_pages>
  <remapped_rows>N/A</remapped_rows>
  <temperature><gpu_temp>38 C</gpu_temp><memory_temp>N/A</memory_temp></temperature>
  <power_readings><power_draw>55.10 W</power_draw><power_limit>300.00 W</power_limit></power_readings>
</gpu>`;

/** Nothing but what no device is without. */
const bareGpu = `<gpu id="00000000:AF:00.0"><uuid>GPU-bare</uuid>
  <fb_memory_usage><total>1000 MiB</total></fb_memory_usage></gpu>`;

const documentOf = (...gpus: readonly string[]): string =>
  `<?xml version="1.0" ?>\n<nvidia_smi_log><driver_version>580.65.06</driver_version>${gpus.join("\n")}</nvidia_smi_log>`;

describe("what nvidia-smi tells of a device", () => {
  it("is read as drivers of today write it", () => {
    const [gpu] = parseNvidiaSmi(documentOf(hopper)).gpus;
    assert.ok(gpu !== undefined);
    const json = toJson(GpuSchema, gpu);
    assert.deepEqual(json, {
      uuid: "GPU-hopper",
      productName: "NVIDIA H100 80GB HBM3",
      model: "H100-SXM",
      memoryMib: 81559,
      driverVersion: "580.65.06",
      pciAddress: "00000000:1B:00.0",
      migMode: "MIG_MODE_ENABLED",
      health: "GPU_HEALTH_HEALTHY",
      serial: "1650000000001",
      ecc: { volatile: { corrected: "3", uncorrected: "0" }, aggregate: { corrected: "16", uncorrected: "12" } },
      remappedRows: { corrected: 7, uncorrected: 0, pending: false, failed: false },
      migDevices: [{ gpuInstanceId: 1, computeInstanceId: 0, memoryMib: 40448, multiprocessorCount: 60 }, { index: 1 }],
      persistenceMode: true,
      computeMode: "Exclusive_Process",
      telemetry: {
        utilizationPercent: 98,
        memoryUtilizationPercent: 40,
        memoryUsedMib: 1024,
        powerWatts: 311.25,
        powerLimitWatts: 700,
        temperatureCelsius: 41,
        memoryTemperatureCelsius: 52,
        smClockMhz: 1980,
        memoryClockMhz: 2619,
        performanceState: "P0",
        throttleReasons: ["sw_power_cap"],
        processes: [{ pid: 4242, type: "C", memoryUsedMib: 1000 }],
      },
    });
    assert.doesNotMatch(JSON.stringify(json), /secret/, "a customer's program is not named");
    assert.equal(createValidator().validate(GpuSchema, gpu).kind, "valid");
  });

  it("is read as older drivers wrote it", () => {
    const [gpu] = parseNvidiaSmi(documentOf(volta)).gpus;
    assert.ok(gpu !== undefined);
    assert.deepEqual(toJson(GpuSchema, gpu), {
      uuid: "GPU-volta",
      productName: "Tesla V100-SXM2-32GB",
      memoryMib: 32510,
      driverVersion: "580.65.06",
      pciAddress: "00000000:3B:00.0",
      health: "GPU_HEALTH_HEALTHY",
      ecc: { volatile: { corrected: "4", uncorrected: "0" }, aggregate: { uncorrected: "2" } },
      retiredPages: { corrected: 3, uncorrected: 1, pending: false },
      persistenceMode: false,
      telemetry: {
        powerWatts: 55.1,
        powerLimitWatts: 300,
        temperatureCelsius: 38,
        throttleReasons: ["hw_thermal_slowdown"],
      },
      ...(gpu.model === "" ? {} : { model: gpu.model }),
    });
  });

  it("is absent where it is not told: nothing is made up", () => {
    const [gpu] = parseNvidiaSmi(documentOf(bareGpu)).gpus;
    assert.ok(gpu !== undefined);
    assert.deepEqual(toJson(GpuSchema, gpu), {
      uuid: "GPU-bare",
      memoryMib: 1000,
      driverVersion: "580.65.06",
      pciAddress: "00000000:AF:00.0",
      health: "GPU_HEALTH_HEALTHY",
      telemetry: {},
    });
  });

  it("may say of any value that it has none, and every other value stays", () => {
    const whole = toJson(GpuSchema, parseNvidiaSmi(documentOf(hopper)).gpus[0] ?? assert.fail());
    const values = [...hopper.matchAll(/>([^<>\s][^<>]*)</g)];
    assert.ok(values.length > 40);
    for (const word of ["N/A", "[N/A]", "ERR!", "[Unknown Error]", "[Not Supported]", "Requires reset", ""]) {
      for (const { index, 1: value = "" } of values) {
        if (value === "GPU-hopper") continue;
        const sick = `${hopper.slice(0, index + 1)}${word}${hopper.slice(index + 1 + value.length)}`;
        const { gpus } = parseNvidiaSmi(documentOf(sick, volta));
        assert.deepEqual(
          gpus.map(({ uuid }) => uuid),
          ["GPU-hopper", "GPU-volta"],
          `${word} for ${value}`,
        );
        assert.equal(gpus[1]?.health, GpuHealth.HEALTHY, "its sibling is as well as before");
        const invented = added(toJson(GpuSchema, gpus[0] ?? assert.fail()), whole);
        assert.deepEqual(invented, [], `${word} for ${value}`);
      }
    }
  });

  it("may break off anywhere: whole devices stay, the broken one is shown and not used", () => {
    const text = documentOf(volta, hopper);
    const firstEnd = text.indexOf("</gpu>") + "</gpu>".length;
    for (let length = 0; length < text.length; length += 7) {
      const { gpus, error } = parseNvidiaSmi(text.slice(0, length));
      assert.notEqual(error, "", `${length}`);
      if (length < firstEnd) {
        assert.ok(
          gpus.every(({ health }) => health === GpuHealth.UNHEALTHY),
          `${length}`,
        );
        continue;
      }
      assert.deepEqual([gpus[0]?.uuid, gpus[0]?.health], ["GPU-volta", GpuHealth.HEALTHY], `${length}`);
      const [, second] = gpus;
      if (second === undefined) continue;
      assert.equal(second.uuid, "GPU-hopper");
      if (!text.slice(0, length).endsWith("</gpu>") && text.slice(0, length).lastIndexOf("</gpu>") < firstEnd)
        assert.equal(second.health, GpuHealth.UNHEALTHY, `${length}`);
    }
  });

  it("may be damaged in one device: the ones before and behind it stay", () => {
    const { gpus, error } = parseNvidiaSmi(documentOf(volta, hopper.replace("</serial>", "<\0&"), bareGpu));
    assert.deepEqual(
      gpus.map(({ uuid, health }) => [uuid, health]),
      [
        ["GPU-volta", GpuHealth.HEALTHY],
        ["GPU-bare", GpuHealth.HEALTHY],
        ["GPU-hopper", GpuHealth.UNHEALTHY],
      ],
    );
    assert.match(error, /damaged/);
  });
});

/**
 * Paths of values that are in `after` and are other ones in `before`. What is less well may say why, and a sum is of
 * what is known.
 */
function added(after: unknown, before: unknown, path = ""): string[] {
  if (/^\.(health|healthMessage|model|migMode|ecc)/.test(path)) return [];
  if (typeof after !== "object" || after === null) return after === before ? [] : [path];
  const old = typeof before === "object" && before !== null ? new Map(Object.entries(before)) : new Map();
  // A list that became shorter: what is left of it stands somewhere in the old one.
  const isList = Array.isArray(after);
  return Object.entries(after).flatMap(([key, value]) => {
    if (!isList) return added(value, old.get(key), `${path}.${key}`);
    const found = [...old.values()].some((candidate) => added(value, candidate).length === 0);
    return found ? [] : [`${path}[${key}]`];
  });
}

describe("the table of nvidia-smi topo -m", () => {
  const table = [
    "\t\u001b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\u001b[0m",
    "GPU0\t X \tNV18\tSYS\tPXB\t0-47\t0\t\tN/A",
    "GPU1\tNV18\t X \tPHB\tSYS\t0-47\t0\t\tN/A",
    "GPU2\tSYS\tPHB\t X \tSYS\t48-95\t1\t\tN/A",
    "NIC0\tPXB\tSYS\tSYS\t X ",
    "",
    "Legend:",
    "",
    "  X    = Self",
    "  SYS  = Connection traversing PCIe",
  ].join("\n");

  it("is read for the GPUs alone", () => {
    assert.deepEqual(
      parseTopology(table).map(({ from, to, kind }) => `${from}-${to} ${kind}`),
      ["0-1 NV18", "0-2 SYS", "1-0 NV18", "1-2 PHB", "2-0 SYS", "2-1 PHB"],
    );
  });

  it("may be anything", () => {
    for (const text of ["", "GPU0", "\tGPU0\nGPU0\t X ", "Failed to initialize NVML: Unknown Error", "\0\t\t\n\t"])
      assert.deepEqual(parseTopology(text), []);
    for (let length = 0; length < table.length; length += 3)
      for (const { kind } of parseTopology(table.slice(0, length))) assert.match(kind, /^(NV1?8?|NV|SYS|PHB)$/);
  });
});
