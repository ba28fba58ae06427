# shellcheck shell=bash
#
# What the scripts share: progress lines, and installing what a machine lacks.
#
# Every `need_*` function returns at once when its tool is there. System packages come through
# apt (Debian; root or sudo), all else goes into target/ or the user's cache, and nothing is
# printed but one line per installation, or the whole output of one that failed.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
TARGET=$(realpath -m "${CARGO_TARGET_DIR:-$ROOT/target}")
VENV=$TARGET/venv
# Compiled tools take minutes, so all clones share them.
TOOLS=${XDG_CACHE_HOME:-~/.cache}/tollkeeper/tools
PATH=$PATH:${CARGO_HOME:-~/.cargo}/bin

if [[ -t 2 ]]; then BOLD=$'\e[1m' PLAIN=$'\e[0m'; else BOLD='' PLAIN=''; fi

say() { printf '%s==> %s%s\n' "$BOLD" "$*" "$PLAIN" >&2; }

die() {
  printf '%serror:%s %s\n' "$BOLD" "$PLAIN" "$*" >&2
  exit 1
}

have() { command -v "$1" >/dev/null; }

# Runs a command and shows what it said only when it fails.
quietly() {
  local output
  output=$("$@" 2>&1 </dev/null) && return
  printf '%s\n' "$output" >&2
  return 1
}

# Runs a command while holding a lock, so that two runs never install the same thing at once.
locked() {
  local lock=$1 status=0
  shift
  mkdir -p "$(dirname "$lock")"
  exec {fd}>"$lock"
  flock "$fd"
  "$@" || status=$?
  exec {fd}>&-
  return "$status"
}

as_root() {
  if [[ $EUID == 0 ]]; then "$@"; else sudo "$@"; fi
}

apt_install() {
  have apt-get || die "this is not a Debian; please install what these packages hold: $*"
  [[ $EUID == 0 ]] || have sudo || die "neither root nor sudo; please run: apt-get install $*"
  say "installing $* (apt)"
  # A password, if sudo wants one, is asked for here; below there is no terminal.
  [[ $EUID == 0 ]] || sudo -v || die "sudo refused; please run as root: apt-get install $*"
  apt_get install "$@" >/dev/null 2>&1 && return
  # The package lists are missing or old.
  quietly apt_get update || true
  quietly apt_get install "$@" || die "apt-get install $* failed"
}

# apt's own lock does not cover `update`, hence flock.
apt_get() {
  as_root flock /var/lib/apt env DEBIAN_FRONTEND=noninteractive \
    apt-get -y -q --no-install-recommends -o DPkg::Lock::Timeout=300 "$@" </dev/null
}

# With make: the allocator is C, and built by its own makefile.
need_c_compiler() {
  have cc || apt_install gcc libc6-dev
  have make || apt_install make
}

need_cargo() {
  need_c_compiler
  have cargo && return
  if have apt-cache && [[ -n $(apt-cache search --names-only '^rustup$') ]]; then
    apt_install ca-certificates rustup
    say "installing the stable Rust toolchain (rustup)"
    quietly rustup default stable || die "rustup could not install a toolchain"
  else
    die "there is no cargo; please install the Rust toolchain: https://rustup.rs"
  fi
}

# Prints the major version of the newest Postgres server on this machine, or 0.
postgres_major() {
  local postgres newest=0 major
  for postgres in /usr/lib/postgresql/*/bin/postgres "$(command -v postgres || true)"; do
    [[ -x $postgres ]] || continue
    major=$("$postgres" --version | sed -E 's/[^0-9]*([0-9]+).*/\1/')
    if ((major > newest)); then newest=$major; fi
  done
  echo "$newest"
}

# The server programs only. Left alone, Debian's package makes a cluster and starts it.
need_postgres() {
  (($(postgres_major) >= 15)) && return
  local settings=/etc/postgresql-common/createcluster.d/tollkeeper.conf
  as_root mkdir -p "$(dirname "$settings")"
  echo 'create_main_cluster = false' | as_root tee "$settings" >/dev/null
  apt_install postgresql
  as_root rm -f "$settings"
  (($(postgres_major) >= 15)) || die "Postgres 15 or newer is needed; found $(postgres_major)"
}

# A Python with the packages of requirements.txt, at $VENV/bin/python.
need_python() {
  locked "$TARGET/venv.lock" make_venv
}

make_venv() {
  local wanted=$ROOT/scripts/requirements.txt made=$VENV/requirements.txt python=python3
  cmp -s "$wanted" "$made" && return
  if ! python3 -c 'import ensurepip' 2>/dev/null; then
    apt_install python3 python3-venv
    python=/usr/bin/python3
  fi
  say "installing the Python clients into ${VENV#"$ROOT"/}"
  quietly "$python" -m venv --clear "$VENV" || die "python -m venv failed"
  quietly "$VENV/bin/pip" install --disable-pip-version-check -r "$wanted" || die "pip failed"
  cp "$wanted" "$made"
}

# need_npm_tool NAME VERSION [PACKAGE]: a program of npm, in $TARGET/tools.
need_npm_tool() {
  local home=$TARGET/tools/$1-$2
  PATH=$home/node_modules/.bin:$PATH
  [[ -x $home/node_modules/.bin/$1 ]] && return
  have npm || apt_install nodejs npm
  say "installing $1 $2 (npm)"
  mkdir -p "$home"
  quietly npm install --no-save --prefix "$home" "${3:-$1}@$2" || die "npm failed"
}

# need_buf VERSION
need_buf() {
  need_npm_tool buf "$1" @bufbuild/buf
}

# need_swagger_generator VERSION: protoc-gen-swagger out of Debian's package, which is not installed.
need_swagger_generator() {
  local home=$TARGET/tools/grpc-gateway-$1 packages
  PATH=$home/usr/bin:$PATH
  [[ -x $home/usr/bin/protoc-gen-swagger ]] && return
  have apt-get || die "protoc-gen-swagger $1 is needed: Debian's package golang-grpc-gateway has it"
  say "fetching protoc-gen-swagger $1 (apt)"
  packages=$(mktemp -d)
  download_package "$packages" "golang-grpc-gateway=$1-*" ||
    { quietly apt_get update; download_package "$packages" "golang-grpc-gateway=$1-*"; } ||
    die "Debian's golang-grpc-gateway $1 cannot be had"
  mkdir -p "$home"
  dpkg -x "$packages"/*.deb "$home"
  rm -rf "$packages"
}

download_package() {
  # Apt drops root's rights for that, where it can.
  chmod 777 "$1"
  (cd "$1" && quietly apt-get download "$2")
}

need_shellcheck() {
  have shellcheck || apt_install shellcheck
}

# need_cargo_tool NAME VERSION: a cargo subcommand, built without optimisation: it is run once.
need_cargo_tool() {
  PATH=$TOOLS/bin:$PATH
  locked "$TOOLS/.lock" build_cargo_tool "$@"
}

build_cargo_tool() {
  [[ $(have "$1" && "$1" --version 2>/dev/null) == *"$2"* ]] && return
  say "building $1 $2 (once for this machine; about two minutes)"
  CARGO_PROFILE_DEV_DEBUG=0 CARGO_TARGET_DIR=$TARGET/tools/build \
    quietly cargo install --debug --locked --root "$TOOLS" "$1@$2" || die "cargo install $1 failed"
  rm -rf "$TARGET/tools/build"
}
