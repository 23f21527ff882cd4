// A process that gives a GPU away when it is told to, for the test in which two of them race. It takes no lock and
// asks nobody what is free, as a replica with a stale view would.
import { parseId } from "@clodei/proto/ids";
import type pg from "pg";
import { Database } from "../platform/database.ts";
import { createLog } from "../platform/log.ts";
import { AllocationConflict, PlacementService, type Placement, type PlacementRequest } from "./service.ts";

/** What the test tells a racer: first where the database is, then each allocation to make. */
export type RacerOrder =
  | { readonly kind: "connect"; readonly system: pg.ClientConfig }
  | {
      readonly kind: "allocate";
      readonly organizationId: string;
      readonly instanceId: string;
      readonly request: PlacementRequest;
      readonly placement: Placement;
    };

/** What a racer answers to each order. */
export type RacerAnswer = "ready" | "won" | "lost" | "failed";

const placement = new PlacementService({ fleet: () => Promise.resolve([]) });
let database: Database | undefined;

async function obey(order: RacerOrder): Promise<RacerAnswer> {
  if (order.kind === "connect") {
    database = new Database({ app: order.system, system: order.system, log: createLog("silent") });
    // The connection is open before the start, so that both run at the same time.
    await database.system((tx) => tx.query("select 1"));
    return "ready";
  }
  const organizationId = parseId("org", order.organizationId);
  const instanceId = parseId("ins", order.instanceId);
  if (database === undefined || organizationId === undefined || instanceId === undefined) return "failed";
  try {
    await database.system((tx) =>
      placement.allocate(tx, { organizationId, instanceId, attempt: 1 }, order.request, order.placement, new Date()),
    );
    return "won";
  } catch (error) {
    return error instanceof AllocationConflict ? "lost" : "failed";
  }
}

process.on("message", (order: RacerOrder) => {
  void obey(order).then((answer) => process.send?.(answer));
});
// The test's end is this process's end.
process.on("disconnect", () => process.exit(0));
