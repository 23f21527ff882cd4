// A stand-in for NVIDIA's tools, because a test machine has no such GPU: programs that print what the documented tool
// prints, so that the agent's own way to it is taken whole, and what they print can be changed while the agent runs.
import { chmod, mkdtemp, rename, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";

/** A GPU that the tool tells of. */
export interface ToldGpu {
  readonly uuid: string;
  /** What the driver says must be done for it: "Reset", "Drain and Reset", … Absent: nothing. */
  readonly recoveryAction?: string;
}

/** nvidia-smi as a program, and the hook by which Docker knows that it can give GPUs to containers. */
export class FakeNvidia implements AsyncDisposable {
  readonly #folder: string;

  private constructor(folder: string) {
    this.#folder = folder;
  }

  /** Makes the programs; the tool tells of no GPU yet. */
  static async make(): Promise<FakeNvidia> {
    const nvidia = new FakeNvidia(await mkdtemp(join(tmpdir(), "clodei-nvidia-")));
    await chmod(nvidia.#folder, 0o755);
    await nvidia.tell([]);
    // A container that asks for a GPU is started as if it got it.
    const programs = {
      "nvidia-smi": `[ "$1" = -q ] && exec sh ${nvidia.#answer}`,
      "nvidia-container-runtime-hook": "",
    };
    for (const [name, script] of Object.entries(programs)) {
      await writeFile(join(nvidia.#folder, name), `#!/bin/sh\n${script}\n`, { mode: 0o755 });
    }
    return nvidia;
  }

  /** The path of nvidia-smi. */
  get tool(): string {
    return join(this.#folder, "nvidia-smi");
  }

  /** To run before an engine, so that it finds the hook. */
  get prelude(): string {
    return `export PATH="$PATH:${this.#folder}"`;
  }

  /** From now on the tool tells of these. */
  async tell(gpus: readonly ToldGpu[]): Promise<void> {
    const text = `<?xml version="1.0" ?>
<!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v12.dtd">
<nvidia_smi_log>
<driver_version>580.65.06</driver_version><cuda_version>13.0</cuda_version>
<attached_gpus>${gpus.length}</attached_gpus>
${gpus.map(deviceOf).join("\n")}
</nvidia_smi_log>`;
    await this.#say(`cat <<'END'\n${text}\nEND\n`);
  }

  /** From now on the tool fails with these words. */
  async fail(words: string, status = 255): Promise<void> {
    await this.#say(`echo '${words}'; exit ${status}\n`);
  }

  async #say(script: string): Promise<void> {
    const path = `${this.#answer}.new`;
    await writeFile(path, script);
    await rename(path, this.#answer);
  }

  get #answer(): string {
    return join(this.#folder, "answer");
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await rm(this.#folder, { recursive: true, force: true });
  }
}

function deviceOf({ uuid, recoveryAction = "None" }: ToldGpu, index: number): string {
  const address = `00000000:${(index + 16).toString(16)}:00.0`;
  return `<gpu id="${address}">
<product_name>NVIDIA H100 80GB HBM3</product_name>
<persistence_mode>Enabled</persistence_mode>
<mig_mode><current_mig>Disabled</current_mig><pending_mig>Disabled</pending_mig></mig_mode>
<uuid>${uuid}</uuid>
<pci><pci_bus_id>${address}</pci_bus_id></pci>
<gpu_recovery_action>${recoveryAction}</gpu_recovery_action>
<performance_state>P0</performance_state>
<fb_memory_usage><total>81559 MiB</total><used>4 MiB</used></fb_memory_usage>
<compute_mode>Default</compute_mode>
<utilization><gpu_util>0 %</gpu_util></utilization>
<temperature><gpu_temp>31 C</gpu_temp></temperature>
</gpu>`;
}
