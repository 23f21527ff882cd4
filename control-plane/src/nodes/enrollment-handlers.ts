// EnrollmentService on the wire: translates, and nothing else.
import { timestampFromDate } from "@bufbuild/protobuf/wkt";
import type { ServiceImpl } from "@connectrpc/connect";
import type { EnrollmentService } from "@clodei/proto/gen/clodei/v1/enrollment_service";
import type { Enrollment } from "./enrollment.ts";
import { requireNodeId } from "./standing.ts";

/** The handlers of clodei.v1.EnrollmentService. */
export function enrollmentHandlers(deps: { readonly enrollment: Enrollment }): ServiceImpl<typeof EnrollmentService> {
  const { enrollment } = deps;
  return {
    async enroll(request) {
      const identity = await enrollment.enroll(request);
      return {
        nodeId: identity.node.nodeId,
        nodeName: identity.node.name,
        location: identity.node.location,
        certificate: identity.certificate,
        trustBundle: [...identity.trustBundle],
        nodeEndpoint: identity.nodeEndpoint,
        expireTime: timestampFromDate(identity.expireTime),
      };
    },
    createRenewalChallenge(request) {
      const { challenge, expireTime } = enrollment.createRenewalChallenge(requireNodeId(request.nodeId));
      return { challenge, expireTime: timestampFromDate(expireTime) };
    },
    async renewExpired(request) {
      const identity = await enrollment.renewExpired({ ...request, nodeId: requireNodeId(request.nodeId) });
      return {
        certificate: identity.certificate,
        trustBundle: [...identity.trustBundle],
        nodeEndpoint: identity.nodeEndpoint,
        expireTime: timestampFromDate(identity.expireTime),
      };
    },
  };
}
