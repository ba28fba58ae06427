use std::path::PathBuf;

use anyhow::Context as _;
use chrono::Utc;
use clap::{Subcommand, ValueEnum};

use super::secrets;
use crate::{
    auth::{generate_key_file, list_key_files},
    config::{Settings, SigningAlgorithm},
};

#[derive(Subcommand)]
pub(super) enum Command {
    /// Make a key file; the newest signs from the next start or SIGHUP on, older ones still verify
    Generate {
        /// Where to; else the key folder of the settings, or in dev mode of the data folder
        #[arg(long, value_name = "DIR")]
        dir: Option<PathBuf>,
        /// What it signs with; else as the settings say
        #[arg(long, value_enum)]
        algorithm: Option<Algorithm>,
        /// Verify with it, but do not sign yet: until `.next` is taken out of its name
        #[arg(long)]
        next: bool,
    },
    /// List the keys, oldest first, by their ids in tokens and in the JWKS
    List {
        /// Where; else the key folder of the settings, or in dev mode of the data folder
        #[arg(long, value_name = "DIR")]
        dir: Option<PathBuf>,
    },
}

#[derive(Clone, Copy, ValueEnum)]
pub(super) enum Algorithm {
    Eddsa,
    Es256,
    Rs256,
}

pub(super) fn run(command: Command, settings: &Settings) -> anyhow::Result<()> {
    let folder = |dir: Option<PathBuf>| {
        dir.or_else(|| Some(secrets::key_dir(settings)))
            .filter(|dir| !dir.as_os_str().is_empty())
            .context("say where: --dir or the setting auth.key_dir")
    };
    match command {
        Command::Generate {
            dir,
            algorithm,
            next,
        } => {
            let algorithm = match algorithm {
                None => settings.auth.algorithm,
                Some(Algorithm::Eddsa) => SigningAlgorithm::EdDsa,
                Some(Algorithm::Es256) => SigningAlgorithm::Es256,
                Some(Algorithm::Rs256) => SigningAlgorithm::Rs256,
            };
            anyhow::ensure!(
                algorithm != SigningAlgorithm::Hs256,
                "HS256 has no key file: its secret is the setting auth.jwt_secret"
            );
            let path = generate_key_file(&folder(dir)?, algorithm, next, Utc::now())?;
            println!("{}", path.display());
        }
        Command::List { dir } => {
            for key in list_key_files(&folder(dir)?)? {
                println!("{}  {}  {}", key.kid, key.algorithm, key.path.display());
            }
        }
    }
    Ok(())
}
