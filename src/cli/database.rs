//! Finds the database a command works on.

use anyhow::Context as _;

use crate::{
    config::{DatabaseSettings, Secret, Settings},
    embedded::{self, Embedded, EmbeddedError, Options},
    store::Migrator,
};

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
