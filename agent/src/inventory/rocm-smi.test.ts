import { describe, it } from "node:test";
import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { toJson } from "@bufbuild/protobuf";
import { GpuHealth, GpuSchema } from "@clodei/proto/gen/clodei/v1/inventory";
import { parseRocmSmi } from "./rocm-smi.ts";

/** A card as the tool's documentation describes it. */
const card = {
  "Unique ID": "0xABCDEF0123456789",
  "Card Series": "Instinct MI300X",
  "PCI Bus": "0000:83:00.0",
  "Serial Number": "692250001234",
  "VRAM Total Memory (B)": "206141652992",
  "VRAM Total Used Memory (B)": "10485760",
  "GPU use (%)": "12",
  "Current Socket Graphics Package Power (W)": "142.0",
  "Max Graphics Package Power (W)": "750.0",
  "Temperature (Sensor junction) (C)": "43.0",
  "Temperature (Sensor memory) (C)": "38.0",
  "sclk clock speed:": "(2100Mhz)",
  "mclk clock speed:": "(900Mhz)",
  "(Topology) Numa Node": "1",
};
const outputOf = (cards: object): string => JSON.stringify({ ...cards, system: { "Driver version": "6.10.5" } });

describe("the output of rocm-smi", () => {
  it("is read card by card, and never placed on", () => {
    const { gpus, error } = parseRocmSmi(outputOf({ card1: { ...card, "Unique ID": "0x1" }, card0: card }));
    assert.deepEqual([gpus.map(({ uuid }) => uuid), error], [["GPU-abcdef0123456789", "GPU-0000000000000001"], ""]);
    assert.deepEqual(toJson(GpuSchema, gpus[0] ?? assert.fail()), {
      uuid: "GPU-abcdef0123456789",
      productName: "Instinct MI300X",
      memoryMib: 196592,
      driverVersion: "6.10.5",
      pciAddress: "0000:83:00.0",
      health: "GPU_HEALTH_HEALTHY",
      serial: "692250001234",
      numaNode: 1,
      telemetry: {
        utilizationPercent: 12,
        memoryUsedMib: 10,
        powerWatts: 142,
        powerLimitWatts: 750,
        temperatureCelsius: 43,
        memoryTemperatureCelsius: 38,
        smClockMhz: 2100,
        memoryClockMhz: 900,
      },
    });
  });

  it("may lack any value: that one is absent, and every other stays", () => {
    for (const name of Object.keys(card)) {
      for (const value of [undefined, "N/A", "", "Unsupported", 7, null, {}]) {
        const { gpus, error } = parseRocmSmi(
          outputOf({ card0: { ...card, [name]: value }, card1: { ...card, "Unique ID": "0x2" } }),
        );
        const sibling = gpus.find(({ uuid }) => uuid === "GPU-0000000000000002");
        assert.equal(sibling?.health, GpuHealth.HEALTHY, name);
        if (name === "Unique ID") assert.match(error, /card0 at 0000:83:00.0: no unique id/);
        else assert.equal(gpus.length, 2, name);
        const health = gpus.find(({ uuid }) => uuid === "GPU-abcdef0123456789")?.health;
        if (name === "VRAM Total Memory (B)") assert.equal(health, GpuHealth.UNHEALTHY);
      }
    }
  });

  it("may be anything: that is an error and no crash", () => {
    const whole = outputOf({ card0: card });
    for (const text of ["", "no cards", "[]", "null", "{", whole.slice(0, 200), `${whole}}`])
      assert.deepEqual(parseRocmSmi(text), { gpus: [], error: "rocm-smi printed no valid JSON" }, text.slice(0, 20));
    assert.deepEqual(parseRocmSmi("{}"), { gpus: [], error: "" });
    assert.deepEqual(parseRocmSmi(`{"card0": []}`), { gpus: [], error: "" });
    assert.match(parseRocmSmi(outputOf({ card0: card, card1: card })).error, /card1.*twice/);
  });

  const samples = join(import.meta.dirname, "../../../../shared/data/gpu-samples/amd");
  it("is read from real machines", { skip: existsSync(samples) ? false : "the samples are not here" }, async () => {
    const mi100 = parseRocmSmi(await readFile(join(samples, "telegraf-mi100_rocm602.json"), "utf8"));
    assert.ok(mi100.gpus.length >= 2);
    assert.equal(mi100.error, "");
    const [first] = mi100.gpus;
    assert.deepEqual(
      [first?.uuid, first?.memoryMib, first?.telemetry?.powerWatts, first?.telemetry?.temperatureCelsius],
      ["GPU-79ccd55167a2124a", 32752, 36, 55],
    );
    // A desktop's card has no id of its own.
    const rx6700 = parseRocmSmi(await readFile(join(samples, "telegraf-rx6700xt_rocm612.json"), "utf8"));
    assert.deepEqual([rx6700.gpus, rx6700.error], [[], "card0 at 0000:07:00.0: no unique id"]);
  });
});
