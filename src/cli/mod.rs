//! The command line: reads settings, runs one command, says what went wrong.

mod accounts;
mod database;
mod import;
mod keys;
mod migrate;
mod numbers;
mod secrets;
mod serve;
mod signals;
mod tiers;
mod usage;

use std::{
    fs,
    io::{self, ErrorKind, Write as _},
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand};

use crate::{
    config::{self, Loaded},
    grpc::probe,
    model::Violation,
    proto::DESCRIPTOR_SET,
};

/// Knows who is calling and how much they may still use.
#[derive(Parser)]
#[command(name = "tollkeeper", version, about, max_term_width = 100)]
struct Cli {
    #[command(flatten)]
    settings: SettingsArgs,
    #[command(subcommand)]
    command: Command,
}

/// Settings: flags over environment over file. `tollkeeper config` shows them all.
#[derive(Args)]
#[command(next_help_heading = "Settings")]
struct SettingsArgs {
    /// TOML file of settings
    #[arg(long, global = true, env = "TOLLKEEPER_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Any setting by its key, for example `--set auth.access_ttl=5m`
    #[arg(long, global = true, value_name = "KEY=VALUE", value_parser = key_value)]
    set: Vec<(String, String)>,
    #[arg(long, global = true, value_name = "URL", help = DATABASE_URL_HELP)]
    database_url: Option<String>,
    /// Where the private Postgres and the keys of dev mode live
    #[arg(long, global = true, value_name = "DIR")]
    data_dir: Option<String>,
    /// Make keys when there are none, even with a database URL
    #[arg(long, global = true)]
    dev: bool,
    /// json, human, or auto: human in dev mode
    #[arg(long, global = true, value_name = "FORMAT")]
    log_format: Option<String>,
}

// As a doc comment it would need backticks.
const DATABASE_URL_HELP: &str =
    "Postgres to use; else the service runs its own [env: DATABASE_URL]";

#[derive(Subcommand)]
enum Command {
    /// Run the service
    ///
    /// Without a database URL it runs its own Postgres in the data folder, makes keys, and prints
    /// an admin login and a service key at its first start.
    Serve {
        /// Address and port; port 0 takes a free one [default: 127.0.0.1:50051]
        #[arg(long, value_name = "ADDRESS")]
        listen: Option<String>,
    },
    /// Change or show the database schema
    #[command(subcommand)]
    Migrate(migrate::Command),
    /// Create users, import those of another system, or take a lost second factor away
    #[command(subcommand)]
    Users(accounts::UsersCommand),
    /// Create service accounts, which programs call with, and rotate their keys
    #[command(subcommand)]
    Services(accounts::ServicesCommand),
    /// Export usage records, or show who and what used a month's tokens
    #[command(subcommand)]
    Usage(usage::Command),
    /// Look at a tiers file before a server reads it
    #[command(subcommand)]
    Tiers(tiers::Command),
    /// Make or list the keys that sign access tokens
    #[command(subcommand)]
    Keys(keys::Command),
    /// Ask a running service whether it serves; exit code 0 if so, else 1
    Health {
        /// Where it listens; https://… with TLS [default: server.listen, on this machine]
        #[arg(long, value_name = "ADDRESS")]
        address: Option<String>,
        /// One of its services; empty: as a whole
        #[arg(long, default_value = "", hide_default_value = true)]
        service: String,
        /// How long to wait
        #[arg(long, default_value = "2s", value_parser = humantime::parse_duration)]
        timeout: Duration,
    },
    /// Print every setting and where it comes from; secrets stay hidden
    Config,
    /// Write the compiled protos, which gateways turn JSON into RPCs by, to standard output
    Descriptor,
}

/// Parses the arguments and runs the command.
pub fn run() -> ExitCode {
    let cli = Cli::parse();
    match tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => match runtime.block_on(dispatch(cli)) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("tollkeeper: {error:#}");
                ExitCode::FAILURE
            }
        },
        Err(error) => {
            eprintln!("tollkeeper: cannot start the runtime: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn dispatch(cli: Cli) -> anyhow::Result<()> {
    match cli.command {
        Command::Serve { listen } => serve::serve(cli.settings.load(listen)?).await,
        Command::Migrate(command) => migrate::run(command, cli.settings.load(None)?).await,
        Command::Users(command) => accounts::users(command, cli.settings.load(None)?).await,
        Command::Services(command) => accounts::services(command, cli.settings.load(None)?).await,
        Command::Usage(command) => usage::run(command, cli.settings.load(None)?).await,
        Command::Tiers(command) => tiers::run(command, &cli.settings.load(None)?.settings),
        Command::Keys(command) => keys::run(command, &cli.settings.load(None)?.settings),
        Command::Health {
            address,
            service,
            timeout,
        } => {
            let address = match address {
                Some(address) => address,
                None => {
                    let settings = cli.settings.load(None)?.settings;
                    let scheme = match settings.tls.is_set() {
                        true => "https",
                        false => "http",
                    };
                    format!("{scheme}://{}", local(settings.server.listen))
                }
            };
            probe(&address, &service, timeout)
                .await
                .map_err(anyhow::Error::msg)?;
            println!("SERVING");
            Ok(())
        }
        Command::Config => {
            let loaded = cli.settings.load(None)?;
            let lines = loaded
                .describe()
                .map(|(key, value, origin)| format!("{key} = {value}  # {origin}\n"));
            print(lines.collect::<String>().as_bytes())
        }
        Command::Descriptor => print(DESCRIPTOR_SET),
    }
}

/// To standard output, of which somebody may read the beginning only.
fn print(bytes: &[u8]) -> anyhow::Result<()> {
    match std::io::stdout().write_all(bytes) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        written => written.context("cannot write to standard output"),
    }
}

impl SettingsArgs {
    fn load(self, listen: Option<String>) -> anyhow::Result<Loaded> {
        let mut flags = self.set;
        let named = [
            ("server.listen", listen),
            ("database.url", self.database_url),
            ("data_dir", self.data_dir),
            ("dev", self.dev.then(|| "true".to_owned())),
            ("log.format", self.log_format),
        ];
        flags.extend(
            named
                .into_iter()
                .filter_map(|(key, value)| Some((key.to_owned(), value?))),
        );
        let environment = std::env::vars_os().filter_map(|(name, value)| {
            Some((name.into_string().ok()?, value.into_string().ok()?))
        });
        Ok(config::load(&flags, environment, self.config.as_deref())?)
    }
}

/// Says which flag a value was wrong for.
fn named<T>(flag: &str, value: Result<T, Violation>) -> anyhow::Result<T> {
    value.map_err(|violation| anyhow::anyhow!("{flag} {violation}"))
}

/// Where a client on this machine finds a server that listens on `address`.
fn local(mut address: SocketAddr) -> SocketAddr {
    if address.ip().is_unspecified() {
        address.set_ip(match address {
            SocketAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
            SocketAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
        });
    }
    address
}

fn key_value(text: &str) -> Result<(String, String), String> {
    let (key, value) = text
        .split_once('=')
        .ok_or("must be of the form KEY=VALUE")?;
    Ok((key.to_owned(), value.to_owned()))
}

/// Puts a file in place that only its owner may read: as a whole or, when killed, not at all.
fn write_private(path: &Path, text: &str) -> anyhow::Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    // One name: what a killed process left goes with the next attempt.
    let (folder, draft) = (folder_of(path), format!(".{name}.new"));
    let write = || {
        match fs::remove_file(folder.join(&draft)) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut draft = tempfile::Builder::new()
            .prefix(&draft)
            .rand_bytes(0)
            .tempfile_in(folder)?;
        draft.write_all(text.as_bytes())?;
        draft.as_file().sync_all()?;
        draft.persist(path)?;
        io::Result::Ok(())
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

/// The folder that a file is in.
fn folder_of(file: &Path) -> &Path {
    match file.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
