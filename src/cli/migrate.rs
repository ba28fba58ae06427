use clap::Subcommand;

use super::{
    database::{Database, migration_status, migrator},
    print,
};
use crate::config::{Loaded, Secret};

#[derive(Subcommand)]
pub(super) enum Command {
    /// Apply every migration that is pending; `serve` does so too
    Up,
    /// Revert the newest migration. Its data is lost
    Down,
    /// List the migrations of this binary and which are applied
    Status,
}

pub(super) async fn run(command: Command, loaded: Loaded) -> anyhow::Result<()> {
    let database = Database::open(&loaded.settings).await?;
    let outcome = migrate(command, &database.settings.url).await;
    database.close().await?;
    outcome
}

async fn migrate(command: Command, url: &Secret) -> anyhow::Result<()> {
    match command {
        Command::Up => {
            let applied = migrator(url).await?.up()?;
            let lines = applied.iter().map(|name| format!("applied {name}\n"));
            match applied.is_empty() {
                true => print(b"nothing to do: the schema is up to date\n"),
                false => print(lines.collect::<String>().as_bytes()),
            }
        }
        Command::Down => match migrator(url).await?.down()? {
            Some(name) => print(format!("reverted {name}\n").as_bytes()),
            None => print(b"nothing to do: no migration is applied\n"),
        },
        Command::Status => {
            let status = migration_status(url).await?;
            let lines = status.into_iter().map(|migration| {
                let mark = match migration.applied {
                    true => "applied",
                    false => "pending",
                };
                format!("{mark}  {}\n", migration.name)
            });
            print(lines.collect::<String>().as_bytes())
        }
    }
}
