import assert from "node:assert/strict";
import { test } from "node:test";
import { OptionError, readOptions } from "./options.ts";

const read = (parameters: readonly string[], hasRealGpus = false, environment: NodeJS.ProcessEnv = {}) =>
  readOptions(parameters, environment, () => hasRealGpus);

test("GPUs are simulated where there are none, and never where there are some, unless they are asked for", () => {
  assert.equal(read([])?.simulatedGpus, "2xH100-SXM");
  assert.equal(read([], true)?.simulatedGpus, undefined);
  assert.equal(read(["--gpus", "real"], true)?.simulatedGpus, undefined);
  assert.equal(read(["--gpus", "1xL40S"], true)?.simulatedGpus, "1xL40S");
});

test("what cannot be started is refused when the command line is read, by the flag's name, with what can", () => {
  const refusals: readonly (readonly [readonly string[], RegExp])[] = [
    [
      ["--gpus", "nonsense"],
      /^--gpus "nonsense" is not of the form COUNTxMODEL.*H100-SXM.*\nFor example: .*--gpus 8x/su,
    ],
    [["--gpus", "65xH100-SXM"], /^--gpus 65 GPUs are more than 64/u],
    [["--gpus", ""], /^--gpus /u],
    [["--gpus", "real"], /^--gpus real: nvidia-smi lists no GPU here/u],
    [["--data", ""], /^--data: name a folder, for example/u],
  ];
  for (const [parameters, message] of refusals) {
    assert.throws(
      () => read(parameters),
      (error) => error instanceof OptionError && message.test(error.message),
    );
  }
  assert.throws(() => read([], false, { CLODEI_DATA: "" }), OptionError);
  assert.throws(() => read(["--gpu", "1xL40S"]), { code: "ERR_PARSE_ARGS_UNKNOWN_OPTION" });
});
