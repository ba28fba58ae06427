//! Finds the keys the service works with; in dev mode makes those that are missing.

use std::{
    fs,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use aws_lc_rs::rand;
use chrono::Utc;

use super::write_private;
use crate::{
    auth::{KeyError, KeyRing, MasterKey, generate_key_file},
    config::{Settings, SigningAlgorithm},
};

/// Where the signing keys are.
pub(super) fn key_dir(settings: &Settings) -> PathBuf {
    if settings.dev && settings.auth.key_dir.as_os_str().is_empty() {
        settings.data_dir.join("keys")
    } else {
        settings.auth.key_dir.clone()
    }
}

/// Reads the signing keys and the master key.
pub(super) fn load(settings: &Settings) -> anyhow::Result<(KeyRing, MasterKey)> {
    let folder = key_dir(settings);
    // Two services starting at once must not each make a key that the other does not know.
    let _lock = if settings.dev {
        Some(lock(&folder)?)
    } else {
        None
    };
    Ok((
        signing_keys(settings, &folder)?,
        master_key(settings, &folder)?,
    ))
}

/// Reads the signing keys once more. Makes none: a folder that was emptied is a mistake. `None`: the secret
/// of HS256 is read at the start only.
pub(super) fn reload_keys(settings: &Settings) -> anyhow::Result<Option<KeyRing>> {
    let algorithm = settings.auth.algorithm;
    if algorithm == SigningAlgorithm::Hs256 {
        return Ok(None);
    }
    let keys = KeyRing::from_folder(&key_dir(settings), algorithm);
    Ok(Some(keys.context("setting auth.key_dir")?))
}

fn signing_keys(settings: &Settings, folder: &Path) -> anyhow::Result<KeyRing> {
    let algorithm = settings.auth.algorithm;
    if algorithm == SigningAlgorithm::Hs256 {
        return Ok(KeyRing::from_secret(&settings.auth.jwt_secret)?);
    }
    match KeyRing::from_folder(folder, algorithm) {
        Err(KeyError::Missing { .. }) if settings.dev => {
            generate_key_file(folder, algorithm, false, Utc::now())?;
            Ok(KeyRing::from_folder(folder, algorithm)?)
        }
        keys => keys.context("setting auth.key_dir"),
    }
}

fn master_key(settings: &Settings, folder: &Path) -> anyhow::Result<MasterKey> {
    if settings.auth.master_key.is_set() {
        return Ok(MasterKey::new(settings.auth.master_key.expose().as_bytes()));
    }
    let path = folder.join("master.key");
    if !path.exists() {
        let mut secret = [0_u8; 32];
        rand::fill(&mut secret).map_err(|_| anyhow::anyhow!("the random source failed"))?;
        let text: String = secret.iter().map(|byte| format!("{byte:02x}")).collect();
        write_private(&path, &text)?;
    }
    let text =
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    anyhow::ensure!(
        text.len() >= 64,
        "{} is damaged: it is too short",
        path.display()
    );
    Ok(MasterKey::new(text.as_bytes()))
}

fn lock(folder: &Path) -> anyhow::Result<fs::File> {
    let context = || format!("cannot make the key folder {}", folder.display());
    if let Some(parent) = folder.parent() {
        fs::create_dir_all(parent).with_context(context)?;
    }
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .with_context(context)?;
    let file = fs::File::create(folder.join(".lock")).with_context(context)?;
    file.lock().with_context(context)?;
    Ok(file)
}
