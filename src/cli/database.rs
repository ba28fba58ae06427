//! Finds the database a command works on.

use anyhow::Context as _;

use crate::{
    config::{DatabaseSettings, Secret, Settings},
    embedded::{self, Embedded, EmbeddedError, Options},
    store::{self, MigrationStatus, Migrator},
};

/// What becomes of a database before it is worked on.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Preparation {
    /// It is made where there is none, and brought up to date.
    Up,
    /// Nothing; one that is not up to date is refused.
    None,
}

impl Preparation {
    /// Refuses to look for a database where there is none: one that was made now would be nobody's.
    pub(super) fn check(self, settings: &Settings) -> anyhow::Result<()> {
        anyhow::ensure!(
            self == Self::Up
                || settings.database.url.is_set()
                || embedded::has_cluster(&settings.data_dir),
            "there is no database in {}: name the --data-dir or --database-url of the service",
            settings.data_dir.display()
        );
        Ok(())
    }

    pub(super) async fn prepare(self, database: &Database) -> anyhow::Result<()> {
        let url = &database.settings.url;
        if self == Self::Up {
            migrator(url).await?.up()?;
            return Ok(());
        }
        let status = migration_status(url).await?;
        anyhow::ensure!(
            status.iter().all(|known| known.applied),
            "the schema is not up to date: run `tollkeeper migrate up` first"
        );
        Ok(())
    }
}

/// A database to work on; a private one lives as long as this.
pub(super) struct Database {
    pub(super) settings: DatabaseSettings,
    private: Option<Embedded>,
}

impl Database {
    /// The configured database; else the private one of a service that is running; else the private
    /// one, started for as long as the command takes.
    pub(super) async fn open(settings: &Settings) -> Result<Self, EmbeddedError> {
        if !settings.database.url.is_set()
            && let Some(url) = embedded::running_url(&settings.data_dir)
        {
            let settings = DatabaseSettings {
                url: Secret::new(url),
                ..settings.database.clone()
            };
            return Ok(Self {
                settings,
                private: None,
            });
        }
        let database = Self::own(settings).await?;
        if database.private.is_some() {
            // Not the database of a service that runs elsewhere: say so.
            eprintln!(
                "using the private Postgres in {}",
                settings.data_dir.display()
            );
        }
        Ok(database)
    }

    /// The configured database, else the private one, started and held by this process alone.
    pub(super) async fn own(settings: &Settings) -> Result<Self, EmbeddedError> {
        if settings.database.url.is_set() {
            return Ok(Self {
                settings: settings.database.clone(),
                private: None,
            });
        }
        let options = Options {
            data_dir: settings.data_dir.clone(),
            settings: Vec::new(),
        };
        let private = Embedded::start(options).await?;
        let settings = DatabaseSettings {
            url: Secret::new(private.database_url()),
            ..settings.database.clone()
        };
        Ok(Self {
            settings,
            private: Some(private),
        })
    }

    /// Stops a private Postgres that this process started.
    pub(super) async fn close(self) -> Result<(), EmbeddedError> {
        match self.private {
            Some(private) => private.stop().await,
            None => Ok(()),
        }
    }
}

/// Connects to migrate; says which setting was wrong.
pub(super) async fn migrator(url: &Secret) -> anyhow::Result<Migrator> {
    Migrator::connect(url.expose())
        .await
        .context("cannot connect to migrate (setting database.url)")
}

/// Looks which migrations there are; says which setting was wrong.
pub(super) async fn migration_status(url: &Secret) -> anyhow::Result<Vec<MigrationStatus>> {
    store::migration_status(url.expose())
        .await
        .context("cannot look at the schema (setting database.url)")
}
