//! Signing keys: a folder of PEM files. All verify; of the configured algorithm, the last by file name
//! signs.

use std::{
    collections::{HashMap, HashSet},
    fs,
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use aws_lc_rs::{
    encoding::{AsDer as _, Pkcs8V1Der},
    rsa,
    signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair},
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use chrono::{DateTime, Utc};
use jsonwebtoken::{
    Algorithm, DecodingKey, EncodingKey,
    jwk::{AlgorithmParameters, Jwk, PublicKeyUse, ThumbprintHash},
};
use serde::Serialize;

use crate::config::{Secret, SigningAlgorithm};

/// The most key files a folder may hold: all of them are tried by their id only, but a folder of
/// thousands is a mistake.
const MAX_KEY_FILES: usize = 100;

/// What is wrong with the keys. Holds no key material.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    #[error("cannot read the key folder {path}")]
    Folder {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("cannot read or write the key file {path}")]
    File {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("the key file {path} {message}")]
    Content {
        path: PathBuf,
        message: &'static str,
    },
    #[error("the key folder {path} holds no {algorithm} key; `tollkeeper keys generate` makes one")]
    Missing {
        path: PathBuf,
        algorithm: &'static str,
    },
    #[error("the key folder {path} holds more than {MAX_KEY_FILES} keys")]
    TooMany { path: PathBuf },
    #[error("the cryptographic library failed")]
    Crypto,
}

/// The keys in use.
pub struct KeyRing {
    pub(super) signing: SigningKey,
    pub(super) verifying: HashMap<String, VerifyingKey>,
    public: Vec<PublicKey>,
}

pub(super) struct SigningKey {
    pub(super) kid: String,
    pub(super) algorithm: Algorithm,
    pub(super) key: EncodingKey,
}

/// A key verifies one algorithm only (RFC 8725 §3.1).
pub(super) struct VerifyingKey {
    pub(super) algorithm: Algorithm,
    pub(super) key: DecodingKey,
}

/// A public key as a JWK (RFC 7517). Members that its kind does not have are `None`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PublicKey {
    pub kty: &'static str,
    pub kid: String,
    pub alg: &'static str,
    #[serde(rename = "use")]
    pub usage: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub crv: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub x: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub y: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub n: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub e: Option<String>,
}

/// A key file as `keys list` shows it.
#[derive(Clone, Debug)]
pub struct KeyFile {
    pub path: PathBuf,
    pub kid: String,
    pub algorithm: &'static str,
}

impl KeyRing {
    /// Reads every `*.pem` of `folder`. Of those of `algorithm`, the last by file name signs; names
    /// made by [`generate_key_file`] begin with their time. A key whose name ends in `.next.pem` only
    /// verifies, so that all replicas can know it before any signs with it.
    ///
    /// # Errors
    /// Names the folder or the file that cannot be used.
    pub fn from_folder(folder: &Path, algorithm: SigningAlgorithm) -> Result<Self, KeyError> {
        let keys = read_folder(folder)?;
        let wanted = jwa(algorithm);
        let signing = keys
            .iter()
            .rposition(|(path, key)| key.algorithm == wanted && !is_next(path))
            .ok_or_else(|| KeyError::Missing {
                path: folder.to_owned(),
                algorithm: name(wanted),
            })?;
        Self::assemble(keys.into_iter().map(|(_, key)| key).collect(), signing)
    }

    /// One HS256 key.
    ///
    /// # Errors
    /// `Crypto`
    pub fn from_secret(secret: &Secret) -> Result<Self, KeyError> {
        let encoding = EncodingKey::from_secret(secret.expose().as_bytes());
        let key = PrivateKey::new(encoding, Algorithm::HS256).ok_or(KeyError::Crypto)?;
        Self::assemble(vec![key], 0)
    }

    pub fn public_keys(&self) -> &[PublicKey] {
        &self.public
    }

    fn assemble(keys: Vec<PrivateKey>, signing: usize) -> Result<Self, KeyError> {
        // One that lies there twice, copied rather than renamed, is one key.
        let mut published = HashSet::new();
        let public = keys
            .iter()
            .filter(|key| published.insert(key.kid.as_str()))
            .filter_map(|key| public_key(&key.jwk, key.algorithm))
            .collect();
        let verifying = keys
            .iter()
            .map(|key| {
                let decoding = DecodingKey::from_jwk(&key.jwk).map_err(|_| KeyError::Crypto)?;
                let verifying = VerifyingKey {
                    algorithm: key.algorithm,
                    key: decoding,
                };
                Ok((key.kid.clone(), verifying))
            })
            .collect::<Result<_, KeyError>>()?;
        let PrivateKey {
            kid,
            algorithm,
            encoding,
            ..
        } = keys.into_iter().nth(signing).ok_or(KeyError::Crypto)?;
        Ok(Self {
            signing: SigningKey {
                kid,
                algorithm,
                key: encoding,
            },
            verifying,
            public,
        })
    }
}

/// Whether a key file is not to sign yet.
fn is_next(path: &Path) -> bool {
    path.to_string_lossy().ends_with(".next.pem")
}

/// Makes a key file that `folder` did not hold, readable by its owner only; returns its path. A key
/// `for_later` verifies and does not sign: see [`KeyRing::from_folder`].
///
/// # Errors
/// When the folder cannot be written, or for HS256, whose secret is a setting and no file.
pub fn generate_key_file(
    folder: &Path,
    algorithm: SigningAlgorithm,
    for_later: bool,
    now: DateTime<Utc>,
) -> Result<PathBuf, KeyError> {
    let jwa = jwa(algorithm);
    let path = folder.join(format!(
        "{}-{}{}.pem",
        now.format("%Y%m%dT%H%M%S%.3fZ"),
        name(jwa),
        if for_later { ".next" } else { "" }
    ));
    let der = generate_pkcs8(algorithm).ok_or(KeyError::Crypto)?;
    let text = pem::encode(&pem::Pem::new("PRIVATE KEY", der));
    let failed = |source| KeyError::File {
        path: path.clone(),
        source,
    };
    fs::create_dir_all(folder).map_err(|source| KeyError::Folder {
        path: folder.to_owned(),
        source,
    })?;
    write_key(&path, &text).map_err(failed)?;
    Ok(path)
}

/// Under another name until it is complete: half a key would keep every service from starting.
fn write_key(path: &Path, text: &str) -> io::Result<()> {
    let draft = path.with_added_extension("new");
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&draft)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    // Unlike a rename, it does not replace a key of the same moment.
    fs::hard_link(&draft, path)?;
    fs::remove_file(&draft)
}

/// The keys of a folder, oldest first.
///
/// # Errors
/// Names the folder or the file that cannot be read.
pub fn list_key_files(folder: &Path) -> Result<Vec<KeyFile>, KeyError> {
    let keys = read_folder(folder)?;
    Ok(keys
        .into_iter()
        .map(|(path, key)| KeyFile {
            path,
            kid: key.kid,
            algorithm: name(key.algorithm),
        })
        .collect())
}

struct PrivateKey {
    kid: String,
    algorithm: Algorithm,
    encoding: EncodingKey,
    jwk: Jwk,
}

impl PrivateKey {
    fn new(encoding: EncodingKey, algorithm: Algorithm) -> Option<Self> {
        let mut jwk = Jwk::from_encoding_key(&encoding, algorithm).ok()?;
        let kid = jwk.thumbprint(ThumbprintHash::SHA256).ok()?;
        jwk.common.key_id = Some(kid.clone());
        jwk.common.public_key_use = Some(PublicKeyUse::Signature);
        Some(Self {
            kid,
            algorithm,
            encoding,
            jwk,
        })
    }
}

fn read_folder(folder: &Path) -> Result<Vec<(PathBuf, PrivateKey)>, KeyError> {
    let failed = |source| KeyError::Folder {
        path: folder.to_owned(),
        source,
    };
    let mut paths = fs::read_dir(folder)
        .map_err(failed)?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<Vec<_>, _>>()
        .map_err(failed)?;
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "pem"));
    if paths.len() > MAX_KEY_FILES {
        return Err(KeyError::TooMany {
            path: folder.to_owned(),
        });
    }
    paths.sort();
    paths
        .into_iter()
        .map(|path| {
            let text = fs::read_to_string(&path).map_err(|source| KeyError::File {
                path: path.clone(),
                source,
            })?;
            match read_pem(&text) {
                Ok(key) => Ok((path, key)),
                Err(message) => Err(KeyError::Content { path, message }),
            }
        })
        .collect()
}

/// Tells the kind of key by what it can be read as: the algorithm follows from the key alone.
fn read_pem(text: &str) -> Result<PrivateKey, &'static str> {
    const KINDS: &str = "must hold a private key in PEM: Ed25519, P-256 or RSA";
    type FromPem = fn(&[u8]) -> jsonwebtoken::errors::Result<EncodingKey>;
    let kinds: [(FromPem, Algorithm); 3] = [
        (EncodingKey::from_ed_pem, Algorithm::EdDSA),
        (EncodingKey::from_ec_pem, Algorithm::ES256),
        (EncodingKey::from_rsa_pem, Algorithm::RS256),
    ];
    let key = kinds
        .into_iter()
        .find_map(|(read, algorithm)| PrivateKey::new(read(text.as_bytes()).ok()?, algorithm))
        .ok_or(KINDS)?;
    if let AlgorithmParameters::RSA(rsa) = &key.jwk.algorithm {
        // RFC 7518 §3.3: 2048 bits at least.
        let modulus = URL_SAFE_NO_PAD.decode(&rsa.n).map_err(|_| KINDS)?;
        if modulus.len() < 256 {
            return Err("holds an RSA key under 2048 bits");
        }
    }
    Ok(key)
}

fn generate_pkcs8(algorithm: SigningAlgorithm) -> Option<Vec<u8>> {
    match algorithm {
        SigningAlgorithm::EdDsa => {
            let der = Ed25519KeyPair::generate().ok()?.to_pkcs8v1().ok()?;
            Some(der.as_ref().to_vec())
        }
        SigningAlgorithm::Es256 => {
            let key = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).ok()?;
            Some(key.to_pkcs8v1().ok()?.as_ref().to_vec())
        }
        SigningAlgorithm::Rs256 => {
            let key = rsa::KeyPair::generate(rsa::KeySize::Rsa2048).ok()?;
            let der: Pkcs8V1Der<'_> = key.as_der().ok()?;
            Some(der.as_ref().to_vec())
        }
        SigningAlgorithm::Hs256 => None,
    }
}

fn public_key(jwk: &Jwk, algorithm: Algorithm) -> Option<PublicKey> {
    let key = PublicKey {
        kty: "",
        kid: jwk.common.key_id.clone()?,
        alg: name(algorithm),
        usage: "sig",
        crv: None,
        x: None,
        y: None,
        n: None,
        e: None,
    };
    match &jwk.algorithm {
        AlgorithmParameters::OctetKeyPair(ed) => Some(PublicKey {
            kty: "OKP",
            crv: Some("Ed25519"),
            x: Some(ed.x.clone()),
            ..key
        }),
        AlgorithmParameters::EllipticCurve(ec) => Some(PublicKey {
            kty: "EC",
            crv: Some("P-256"),
            x: Some(ec.x.clone()),
            y: Some(ec.y.clone()),
            ..key
        }),
        AlgorithmParameters::RSA(rsa) => Some(PublicKey {
            kty: "RSA",
            n: Some(rsa.n.clone()),
            e: Some(rsa.e.clone()),
            ..key
        }),
        // A symmetric key is a secret.
        _ => None,
    }
}

fn jwa(algorithm: SigningAlgorithm) -> Algorithm {
    match algorithm {
        SigningAlgorithm::EdDsa => Algorithm::EdDSA,
        SigningAlgorithm::Es256 => Algorithm::ES256,
        SigningAlgorithm::Rs256 => Algorithm::RS256,
        SigningAlgorithm::Hs256 => Algorithm::HS256,
    }
}

fn name(algorithm: Algorithm) -> &'static str {
    match algorithm {
        Algorithm::ES256 => "ES256",
        Algorithm::RS256 => "RS256",
        Algorithm::HS256 => "HS256",
        _ => "EdDSA",
    }
}
