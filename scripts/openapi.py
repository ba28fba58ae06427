#!/usr/bin/env python3
"""Puts generated documents of OpenAPI together: scripts/openapi calls it.

    openapi.py IMAGE DOCUMENT...      prints one document

What the generator cannot know is added here: what an RPC asks of its caller (from its access rule, in
the image that buf built), how errors look, and GET /health, which the gateway answers.
"""

import json
import re
import sys

DESCRIPTION = """\
Tollkeeper's RPCs by JSON, as a gateway with `deploy/envoy/envoy.yaml` gives them; `docs/gateway.md` \
tells the rest. Numbers of 64 bits are strings. Every answer has the header `x-request-id`.\
"""

SECURITY = {
    "bearer": {
        "type": "http",
        "scheme": "bearer",
        "description": "An access token or API key of a user, or the key of a service.",
    }
}

TEXT = {"type": "string"}

ERRORS = {
    "Status": {
        "type": "object",
        "description": "What Tollkeeper refused, a `google.rpc.Status`.",
        "required": ["code", "message", "details"],
        "properties": {
            "code": {"type": "integer", "format": "int32", "description": "The code of gRPC."},
            "message": {"type": "string", "description": "For people."},
            "details": {
                "type": "array",
                "description": "The first is a `google.rpc.ErrorInfo`: switch on its `reason`, a name of "
                "`tollkeeper.error.v1.ErrorReason`; `metadata` has the `request_id`. Others follow "
                "where they fit, such as `google.rpc.BadRequest` and `google.rpc.RetryInfo`.",
                "items": {
                    "type": "object",
                    "required": ["@type"],
                    "properties": {
                        "@type": TEXT,
                        "reason": TEXT,
                        "domain": TEXT,
                        "metadata": {"type": "object", "additionalProperties": TEXT},
                    },
                    "additionalProperties": True,
                },
            },
        },
    },
    "Problem": {
        "type": "object",
        "description": "What the gateway refused (RFC 9457).",
        "required": ["type", "status", "code", "request_id"],
        "properties": {
            "type": TEXT,
            "status": {"type": "integer", "format": "int32"},
            "code": {"type": "string", "description": "Switch on it."},
            "detail": {"type": "string", "description": "For people."},
            "request_id": TEXT,
        },
    },
}

REFUSED = {
    "description": "Refused, by Tollkeeper or by the gateway.",
    "content": {
        "application/json": {"schema": {"$ref": "#/components/schemas/Status"}},
        "application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}},
    },
}


def health():
    def answer(description, status):
        schema = {
            "type": "object",
            "required": ["status"],
            "properties": {"status": {"type": "string", "enum": [status]}},
        }
        return {"description": description, "content": {"application/json": {"schema": schema}}}

    return {
        "get": {
            "summary": "Says whether a Tollkeeper serves.",
            "operationId": "Health",
            "responses": {"200": answer("It does.", "healthy"), "503": answer("None does.", "unhealthy")},
            "security": [],
        }
    }


def public(image):
    """Method and path of what everybody may call."""
    for file in image["file"]:
        for service in file.get("service", ()):
            for method in service["method"]:
                options = method.get("options", {})
                http = options.get("[google.api.http]", {})
                rule = options.get("[tollkeeper.access.v1.rule]", {})
                if "CALLER_KIND_PUBLIC" in rule.get("callers", ()):
                    yield from ((verb, path) for verb, path in http.items() if path.startswith("/"))


def told(operation):
    """The first sentence as the summary; the generator takes the first paragraph."""
    paragraphs = (operation.get("summary", ""), operation.get("description", ""))
    text = "\n\n".join(" ".join(part.split()) for whole in paragraphs for part in whole.split("\n\n") if part)
    summary, _, rest = re.sub(r"\.\s+", ".\0", text, count=1).partition("\0")
    said = {"summary": summary}
    if rest:
        said["description"] = rest
    return said


def references(part):
    """Names of all schemas that a part of the document names."""
    if isinstance(part, dict):
        for key, value in part.items():
            if key == "$ref":
                yield value.rpartition("/")[2]
            else:
                yield from references(value)
    elif isinstance(part, list):
        for value in part:
            yield from references(value)


def main():
    image, *documents = [json.load(open(path, encoding="utf-8")) for path in sys.argv[1:]]
    everybody = set(public(image))
    paths, schemas = {}, dict(ERRORS)
    for document in documents:
        # Names begin with the version of the package; there is one version.
        document = json.loads(json.dumps(document).replace("#/components/schemas/v1", "#/components/schemas/"))
        for path, item in document["paths"].items():
            for verb, operation in item.items():
                operation = told(operation) | {
                    key: value for key, value in operation.items() if key not in ("summary", "description")
                }
                operation["responses"]["200"]["description"] = "Done."
                operation["responses"]["default"] = REFUSED
                operation["security"] = [] if (verb, path) in everybody else [{"bearer": []}]
                paths.setdefault(path, {})[verb] = operation
        for name, schema in document.get("components", {}).get("schemas", {}).items():
            name = name.removeprefix("v1")
            if schemas.setdefault(name, schema) != schema:
                sys.exit(f"two schemas are called {name}")
    paths["/health"] = health()

    used, found = set(), set(references(paths))
    while found:
        used |= found
        found = {name for seen in found for name in references(schemas[seen])} - used
    document = {
        "openapi": "3.0.3",
        "info": {"title": "Tollkeeper", "version": "v1", "description": DESCRIPTION},
        "paths": dict(sorted(paths.items())),
        "components": {
            "schemas": {name: schemas[name] for name in sorted(used)},
            "securitySchemes": SECURITY,
        },
    }
    print(json.dumps(document, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
