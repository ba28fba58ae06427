//! Generated code and the descriptor set; and, by hand, what metadata is made of in the answers to
//! gateways: to fill a map takes longer than all else in an answer.

#![allow(
    clippy::all,
    clippy::doc_markdown,
    missing_docs,
    unreachable_pub,
    rustdoc::all,
    reason = "generated"
)]

/// Every proto file of this service with its imports and their options, as compiled by `build.rs`.
pub const DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptor_set.bin"));

/// `google.protobuf.Struct` of texts alone, byte for byte, as a list. Other kinds of values are read as
/// none.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Texts {
    #[prost(message, repeated, tag = "1")]
    pub fields: Vec<TextField>,
}

/// An entry of [`Texts`].
#[derive(Clone, PartialEq, prost::Message)]
pub struct TextField {
    /// UTF-8; of those that are always the same nothing is copied.
    #[prost(bytes = "bytes", tag = "1")]
    pub key: bytes::Bytes,
    #[prost(message, optional, tag = "2")]
    pub value: Option<Text>,
}

/// `google.protobuf.Value` of kind `string_value`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Text {
    #[prost(string, optional, tag = "3")]
    pub string_value: Option<String>,
}

/// What gateways speak: `third_party/proto/README.md`.
pub mod envoy {
    pub mod config {
        pub mod core {
            pub mod v3 {
                tonic::include_proto!("envoy.config.core.v3");
            }
        }
    }
    pub mod extensions {
        pub mod common {
            pub mod ratelimit {
                pub mod v3 {
                    tonic::include_proto!("envoy.extensions.common.ratelimit.v3");
                }
            }
        }
    }
    pub mod service {
        pub mod auth {
            pub mod v3 {
                tonic::include_proto!("envoy.service.auth.v3");
            }
        }
        pub mod ratelimit {
            pub mod v3 {
                tonic::include_proto!("envoy.service.ratelimit.v3");
            }
        }
    }
    pub mod r#type {
        pub mod v3 {
            tonic::include_proto!("envoy.r#type.v3");
        }
    }
}

pub mod tollkeeper {
    pub mod access {
        pub mod v1 {
            tonic::include_proto!("tollkeeper.access.v1");
        }
    }
    pub mod admin {
        pub mod v1 {
            tonic::include_proto!("tollkeeper.admin.v1");
        }
    }
    pub mod auth {
        pub mod v1 {
            tonic::include_proto!("tollkeeper.auth.v1");
        }
    }
    pub mod error {
        pub mod v1 {
            tonic::include_proto!("tollkeeper.error.v1");
        }
    }
    pub mod usage {
        pub mod v1 {
            tonic::include_proto!("tollkeeper.usage.v1");
        }
    }
}
