# syntax=docker/dockerfile:1
#
# The service alone; its Postgres is elsewhere, named by DATABASE_URL (see compose.yaml).
#
#   docker build -t tollkeeper .

FROM rust:1.95-slim-bookworm AS build
WORKDIR /src

# The allocator is built by its own makefile.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends make \
 && rm -rf /var/lib/apt/lists/*

# The dependencies, against empty sources: this layer lasts until Cargo.toml or Cargo.lock changes.
COPY Cargo.toml Cargo.lock ./
RUN mkdir src \
 && touch src/lib.rs \
 && echo 'fn main() {}' > build.rs \
 && cp build.rs src/main.rs \
 && cargo build --release --locked \
 # The copied sources may be older than what was built from the empty ones.
 && cargo clean --release --locked --package tollkeeper

COPY . .
RUN cargo build --release --locked

FROM debian:bookworm-slim

# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --system --uid 10001 --home-dir /var/lib/tollkeeper --shell /usr/sbin/nologin tollkeeper \
 # A volume mounted here for the first time takes over owner and mode.
 && install -d -o tollkeeper -g tollkeeper -m 0700 /var/lib/tollkeeper /var/lib/tollkeeper/keys

COPY --from=build /src/target/release/tollkeeper /usr/local/bin/

USER 10001
ENV TOLLKEEPER_SERVER_LISTEN=0.0.0.0:50051 \
    TOLLKEEPER_OPS_LISTEN=0.0.0.0:9464 \
    TOLLKEEPER_DATA_DIR=/var/lib/tollkeeper \
    TOLLKEEPER_AUTH_KEY_DIR=/var/lib/tollkeeper/keys \
    TOLLKEEPER_LOG_FORMAT=json
EXPOSE 50051 9464
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s --start-interval=1s \
    CMD ["tollkeeper", "health"]
ENTRYPOINT ["tollkeeper"]
CMD ["serve"]
