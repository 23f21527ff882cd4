// Preloaded into a server: the first SIGUSR2 begins to watch its event loop, the second prints what was seen.
// At rest it costs nothing, which prom-client's own histogram does not.
import { monitorEventLoopDelay } from "node:perf_hooks";

const histogram = monitorEventLoopDelay({ resolution: 10 });
let watching = false;

process.on("SIGUSR2", () => {
  watching = !watching;
  if (watching) {
    histogram.reset();
    histogram.enable();
    return;
  }
  histogram.disable();
  const ms = (nanoseconds) => nanoseconds / 1e6;
  const eventLoop = {
    p50Ms: ms(histogram.percentile(50)),
    p99Ms: ms(histogram.percentile(99)),
    maxMs: ms(histogram.max),
  };
  // Not by the console: the control plane takes that for a line of its log.
  process.stdout.write(`${JSON.stringify({ eventLoop })}\n`);
});
