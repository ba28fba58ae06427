//! Measures the service against a service that does nothing, under production settings.
//!
//! `scripts/bench` builds what is needed and runs this. Everything that is compared is measured in
//! turns, in a rotated order, because the machine's other work changes from second to second;
//! ratios within a round and processor time per call are what to look at.

mod echo;
mod envoy;
mod fixture;
mod h2load;
mod layers;
mod ledger;
mod load;
mod login;
mod memory;
mod naive;
mod pages;
mod process;
mod quota;
mod report;
mod revocation;
mod serve_echo;
mod wire;

use std::{path::PathBuf, thread::available_parallelism, time::Duration};

use clap::{Args, Parser, Subcommand};

/// As in the product.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Measures the service; see README.md, "Performance".
#[derive(Parser)]
#[command(name = "scripts/bench")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Throughput, latency and CPU time of single calls, against a no-op echo
    Wire {
        #[command(flatten)]
        options: Options,
        /// Calls under way at once [default: 1,8,32,128]
        #[arg(long, value_delimiter = ',', value_name = "N,…")]
        in_flight: Vec<usize>,
        /// Only these; the echo is always measured [default: all]
        #[arg(long, value_delimiter = ',', value_name = "PART,…")]
        parts: Vec<wire::Part>,
        /// Live tokens, of as many users [default: 100000, quick 2000]
        #[arg(long)]
        tokens: Option<usize>,
        /// Connections at most
        #[arg(long, default_value_t = 8)]
        connections: usize,
    },
    /// What each layer of the server adds to a call, in this process
    Layers {
        #[command(flatten)]
        options: Options,
    },
    /// Logins against what the hash alone allows, and what they do to other calls
    Login {
        #[command(flatten)]
        options: Options,
    },
    /// Many more live tokens than usual: memory, hits and throughput
    Memory {
        #[command(flatten)]
        options: Options,
        /// Live tokens [default: 1000000, quick 20000]
        #[arg(long)]
        tokens: Option<usize>,
        /// Bounds of memory to try, MiB [default: 256,2048; quick 8,64]
        #[arg(long, value_delimiter = ',', value_name = "MIB,…")]
        bounds: Vec<u64>,
    },
    /// How soon a revocation on one replica is known on two others, under load
    Revocation {
        #[command(flatten)]
        options: Options,
        /// Revocations in all [default: 1000, quick 50]
        #[arg(long)]
        trials: Option<usize>,
    },
    /// Booking usage, against a naive handler and against Postgres alone
    Ledger {
        #[command(flatten)]
        options: Options,
        /// Only these [default: all]
        #[arg(long, value_delimiter = ',', value_name = "PART,…")]
        parts: Vec<ledger::Part>,
        /// Calls under way at once [default: 8,16,64,1024]
        #[arg(long, value_delimiter = ',', value_name = "N,…")]
        in_flight: Vec<usize>,
        /// Events of a batch, up to 1000
        #[arg(
            long,
            value_delimiter = ',',
            value_name = "N,…",
            default_value = "10,100,1000"
        )]
        batches: Vec<usize>,
        /// Users whose usage it is [default: 100000, quick 2000]
        #[arg(long)]
        users: Option<usize>,
        /// Events that are there already, to see what they slow down; up to four ledgers
        /// [default: 10000,1000000,20000000, which take 23 GB of disk; quick 1000,20000]
        #[arg(long, value_delimiter = ',', value_name = "N,…")]
        existing: Vec<u64>,
    },
    /// Deciding about quota, beside an echo and beside a database asked for each decision
    Quota {
        #[command(flatten)]
        options: Options,
        /// Calls under way at once [default: 8,32,128]
        #[arg(long, value_delimiter = ',', value_name = "N,…")]
        in_flight: Vec<usize>,
        /// Users whose quota it is [default: 100000, quick 2000]
        #[arg(long)]
        users: Option<usize>,
        /// What is measured, beside the echo [default: all]
        #[arg(long, value_enum, value_delimiter = ',')]
        parts: Vec<quota::Part>,
    },
    /// What asking this service adds to a real gateway, beside one that answers at once
    Envoy {
        #[command(flatten)]
        options: Options,
        /// Calls under way at once [default: 32,128; quick 32]
        #[arg(long, value_delimiter = ',', value_name = "N,…")]
        in_flight: Vec<usize>,
        /// Users who call. Of many more, each would come less often than once a minute, which is when
        /// what they have ready is given back [default: 20000, quick 2000]
        #[arg(long)]
        users: Option<usize>,
        /// The gateway
        #[arg(long, env = "BENCH_ENVOY", value_name = "PROGRAM", hide = true)]
        envoy: PathBuf,
    },
    /// Answers a gateway always the same, until standard input ends
    #[command(hide = true)]
    EnvoyNoop {
        /// The answers of its two services, base64
        #[arg(long)]
        check: String,
        #[arg(long)]
        limit: String,
    },
    /// A page far down the list of users, beside the first one
    Pages {
        #[command(flatten)]
        options: Options,
        /// Users in the list [default: 1000000, quick 20000]
        #[arg(long)]
        users: Option<usize>,
    },
    /// Checks quota as one would write it first, until standard input ends
    #[command(hide = true)]
    NaiveQuota {
        #[arg(long, value_enum)]
        shape: quota::Shape,
        #[arg(long)]
        url: String,
    },
    /// Books usage as one would write it first, until standard input ends
    #[command(hide = true)]
    Naive {
        #[arg(long, value_enum)]
        shape: ledger::Shape,
        #[arg(long)]
        database_url: String,
    },
    /// Keeps every core busy until standard input ends
    #[command(hide = true)]
    Burn,
    /// Serves the echo as the product serves, until standard input ends
    #[command(hide = true)]
    Echo {
        #[arg(long, value_enum)]
        shape: serve_echo::Shape,
    },
}

#[derive(Args)]
struct Options {
    /// A short run that shows that all works; its figures mean little
    #[arg(long)]
    quick: bool,
    /// Rounds, in each of which everything has its turn [default: 5, quick 2]
    #[arg(long)]
    rounds: Option<usize>,
    /// Length of a turn [default: 2, quick 0.5]
    #[arg(long)]
    seconds: Option<f64>,
    /// Threads of the load generator [default: one per core]
    #[arg(long)]
    threads: Option<usize>,
    /// The service
    #[arg(long, env = "BENCH_SERVICE", value_name = "PROGRAM", hide = true)]
    service: PathBuf,
    /// The echo as a default build
    #[arg(long, env = "BENCH_ECHO", value_name = "PROGRAM", hide = true)]
    echo: PathBuf,
    /// Where the results go
    #[arg(long, env = "BENCH_RESULTS", value_name = "FOLDER", hide = true)]
    results: PathBuf,
    /// Given by cargo
    #[arg(long, hide = true)]
    bench: bool,
}

impl Options {
    fn rounds(&self) -> usize {
        self.rounds.unwrap_or(if self.quick { 2 } else { 5 }).max(1)
    }

    fn slice(&self) -> Duration {
        Duration::from_secs_f64(self.seconds.unwrap_or(if self.quick { 0.5 } else { 2.0 }))
    }

    fn threads(&self) -> usize {
        self.threads.unwrap_or_else(cores)
    }
}

fn cores() -> usize {
    available_parallelism().map_or(1, usize::from)
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().command {
        Command::Wire {
            options,
            in_flight,
            parts,
            tokens,
            connections,
        } => wire::run(&wire::Plan {
            tokens: tokens
                .unwrap_or(if options.quick { 2_000 } else { 100_000 })
                .max(1),
            in_flight: match (in_flight.is_empty(), options.quick) {
                (true, true) => vec![32],
                (true, false) => vec![1, 8, 32, 128],
                (false, _) => in_flight,
            },
            parts,
            connections,
            options,
        }),
        Command::Layers { options } => layers::run(&options),
        Command::Login { options } => login::run(&options),
        Command::Memory {
            options,
            tokens,
            bounds,
        } => {
            let defaults = if options.quick {
                (20_000, vec![8, 64])
            } else {
                (1_000_000, vec![256, 2048])
            };
            let bounds = if bounds.is_empty() {
                defaults.1
            } else {
                bounds
            };
            memory::run(&options, tokens.unwrap_or(defaults.0).max(1), &bounds)
        }
        Command::Revocation { options, trials } => {
            let trials = trials.unwrap_or(if options.quick { 50 } else { 1_000 });
            revocation::run(&options, trials.max(1))
        }
        Command::Ledger {
            options,
            parts,
            in_flight,
            batches,
            users,
            existing,
        } => ledger::run(&ledger::Plan {
            in_flight: match (in_flight.is_empty(), options.quick) {
                (true, true) => vec![16, 256],
                (true, false) => vec![8, 16, 64, 1024],
                (false, _) => in_flight,
            },
            users: users
                .unwrap_or(if options.quick { 2_000 } else { 100_000 })
                .max(1),
            existing: match (existing.is_empty(), options.quick) {
                (true, true) => vec![1_000, 20_000],
                (true, false) => vec![10_000, 1_000_000, 20_000_000],
                (false, _) => existing,
            },
            batches,
            parts,
            options,
        }),
        Command::Naive {
            shape,
            database_url,
        } => ledger::serve_naively(shape, &database_url),
        Command::Quota {
            options,
            in_flight,
            users,
            parts,
        } => quota::run(&quota::Plan {
            parts,
            in_flight: match (in_flight.is_empty(), options.quick) {
                (true, true) => vec![32],
                (true, false) => vec![8, 32, 128],
                (false, _) => in_flight,
            },
            users: users
                .unwrap_or(if options.quick { 2_000 } else { 100_000 })
                .max(1),
            options,
        }),
        Command::Envoy {
            options,
            in_flight,
            users,
            envoy,
        } => envoy::run(&envoy::Plan {
            in_flight: match (in_flight.is_empty(), options.quick) {
                (true, true) => vec![32],
                (true, false) => vec![32, 128],
                (false, _) => in_flight,
            },
            users: users
                .unwrap_or(if options.quick { 2_000 } else { 20_000 })
                .max(1),
            envoy,
            options,
        }),
        Command::EnvoyNoop { check, limit } => envoy::serve_noop(&check, &limit),
        Command::Pages { options, users } => pages::run(&pages::Plan {
            users: users.unwrap_or(if options.quick { 20_000 } else { 1_000_000 }),
            options,
        }),
        Command::NaiveQuota { shape, url } => quota::serve_naively(shape, &url),
        Command::Burn => {
            process::burn();
            Ok(())
        }
        Command::Echo { shape } => serve_echo::run(shape),
    }
}

/// A runtime for the few things that are asynchronous here.
fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?)
}
