# shellcheck shell=bash
#
# To be sourced: defines `grpcurl` by `buf curl`, where the real one is missing.
#
# Knows -plaintext, -d, -H and the words `list` and `PACKAGE.Service/Method`, as the README uses
# them. Needs `buf`, or npx to fetch it.

if ! command -v grpcurl >/dev/null; then
  grpcurl() {
    local args=() words=()
    while (($#)); do
      case $1 in
        -plaintext) args+=(--http2-prior-knowledge --protocol grpc) ;;
        -d | -H) args+=("$1" "$2"); shift ;;
        *) words+=("$1") ;;
      esac
      shift
    done
    local buf=(buf)
    command -v buf >/dev/null || buf=(npx --yes @bufbuild/buf)
    if [[ ${words[1]} == list ]]; then
      "${buf[@]}" curl "${args[@]}" --list-services "http://${words[0]}"
    else
      "${buf[@]}" curl "${args[@]}" "http://${words[0]}/${words[1]}"
    fi
  }
fi
