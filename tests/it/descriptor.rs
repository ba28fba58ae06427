//! The contract as compiled, read by the tests themselves: nothing here shares code with the server.

use prost::Message as _;
use prost_types::{
    DescriptorProto, FieldDescriptorProto, FileDescriptorSet, field_descriptor_proto::Type,
};
use tollkeeper::proto::DESCRIPTOR_SET;

/// One RPC of ours.
#[derive(Clone, Debug)]
pub(crate) struct Rpc {
    /// `/package.Service/Method`.
    pub(crate) path: String,
    /// Full name of the request message.
    pub(crate) input: String,
    pub(crate) server_streaming: bool,
    pub(crate) rule: Rule,
    /// Method and path by which it is called with JSON, if it is.
    pub(crate) http: Option<(String, String)>,
}

/// The access rule of an RPC as declared.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Rule {
    pub(crate) public: bool,
    pub(crate) user: bool,
    pub(crate) service: bool,
    pub(crate) admin: bool,
    pub(crate) session_only: bool,
    pub(crate) scope: String,
}

/// A field of a message.
#[derive(Clone, Debug)]
pub(crate) struct Field {
    pub(crate) name: String,
    pub(crate) number: i32,
    /// Full name of the message that it holds, if it holds one.
    pub(crate) message: Option<String>,
}

/// Every RPC of the packages `tollkeeper.*`.
pub(crate) fn own_rpcs() -> Vec<Rpc> {
    let mut rpcs = rpcs();
    rpcs.retain(|rpc| rpc.path.starts_with("/tollkeeper."));
    rpcs
}

/// Every RPC of the contract, those of the protocols of others too.
pub(crate) fn rpcs() -> Vec<Rpc> {
    let mut rpcs = Vec::new();
    for file in mirror::FileSet::decode(DESCRIPTOR_SET).expect("valid").file {
        for service in file.service {
            for method in service.method {
                let path = format!("/{}.{}/{}", file.package, service.name, method.name);
                let options = method.options.unwrap_or_default();
                let rule = options.rule;
                let rule = rule.unwrap_or_else(|| panic!("{path} declares no rule"));
                rpcs.push(Rpc {
                    path,
                    input: method.input.trim_start_matches('.').to_owned(),
                    server_streaming: method.server_streaming,
                    rule: rule.into(),
                    http: options.http.map(mirror::Http::method_and_path),
                });
            }
        }
    }
    rpcs
}

/// The fields of a message, by its full name.
pub(crate) fn fields(message: &str) -> Vec<Field> {
    for file in file_set().file {
        let package = file.package().to_owned();
        for found in file.message_type {
            if format!("{package}.{}", found.name()) == message {
                return found.field.iter().map(|f| Field::of(f, &found)).collect();
            }
        }
    }
    panic!("no message {message}")
}

/// The value names of the enum `name` of `package`.
pub(crate) fn enum_values(package: &str, name: &str) -> Vec<String> {
    let set = file_set();
    let files = set.file.iter().filter(|file| file.package() == package);
    let found = files.flat_map(|file| &file.enum_type);
    let found = found.filter(|candidate| candidate.name() == name);
    found
        .flat_map(|found| &found.value)
        .map(|value| value.name().to_owned())
        .collect()
}

/// The comment of a value of the enum `name` of `package`, in one line.
pub(crate) fn enum_value_comment(package: &str, name: &str, value: &str) -> String {
    let set = file_set();
    let file = set.file.iter().find(|file| file.package() == package);
    let file = file.unwrap_or_else(|| panic!("no package {package}"));
    let at = file.enum_type.iter().position(|found| found.name() == name);
    let at = at.unwrap_or_else(|| panic!("no enum {name}"));
    let values = &file.enum_type[at].value;
    let index = values.iter().position(|found| found.name() == value);
    let index = index.unwrap_or_else(|| panic!("no value {value}"));
    // descriptor.proto: enum_type = 5 of a file, value = 2 of an enum.
    let path = [5, at, 2, index].map(|step| i32::try_from(step).expect("small"));
    let locations = file.source_code_info.iter().flat_map(|info| &info.location);
    let mut found = locations.filter(|location| location.path == path);
    let comment = found.next().map(|location| location.leading_comments());
    comment.unwrap_or_default().replace('\n', " ")
}

fn file_set() -> FileDescriptorSet {
    FileDescriptorSet::decode(DESCRIPTOR_SET).expect("valid")
}

impl Field {
    fn of(field: &FieldDescriptorProto, parent: &DescriptorProto) -> Self {
        let type_name = field.type_name().trim_start_matches('.').to_owned();
        // A map is a repeated entry message that is nested in the message.
        let is_map = parent.nested_type.iter().any(|nested| {
            nested
                .options
                .as_ref()
                .is_some_and(|options| options.map_entry())
                && type_name.ends_with(&format!("{}.{}", parent.name(), nested.name()))
        });
        Self {
            name: field.name().to_owned(),
            number: field.number(),
            message: (field.r#type() == Type::Message && !is_map).then_some(type_name),
        }
    }
}

impl From<mirror::Rule> for Rule {
    fn from(rule: mirror::Rule) -> Self {
        let names = |kind| rule.callers.contains(&kind);
        // The numbers of tollkeeper.access.v1.CallerKind, which never change.
        Self {
            public: names(1),
            user: names(2),
            service: names(3),
            admin: names(4),
            session_only: rule.session_only,
            scope: rule.scope,
        }
    }
}

/// As much of `descriptor.proto` and `access.proto` as the walk needs: `prost_types` drops options
/// that it does not know.
mod mirror {
    #[derive(prost::Message)]
    pub(super) struct FileSet {
        #[prost(message, repeated, tag = "1")]
        pub(super) file: Vec<File>,
    }

    #[derive(prost::Message)]
    pub(super) struct File {
        #[prost(string, tag = "2")]
        pub(super) package: String,
        #[prost(message, repeated, tag = "6")]
        pub(super) service: Vec<Service>,
    }

    #[derive(prost::Message)]
    pub(super) struct Service {
        #[prost(string, tag = "1")]
        pub(super) name: String,
        #[prost(message, repeated, tag = "2")]
        pub(super) method: Vec<Method>,
    }

    #[derive(prost::Message)]
    pub(super) struct Method {
        #[prost(string, tag = "1")]
        pub(super) name: String,
        #[prost(string, tag = "2")]
        pub(super) input: String,
        #[prost(message, optional, tag = "4")]
        pub(super) options: Option<Options>,
        #[prost(bool, tag = "6")]
        pub(super) server_streaming: bool,
    }

    #[derive(prost::Message)]
    pub(super) struct Options {
        #[prost(message, optional, tag = "50611")]
        pub(super) rule: Option<Rule>,
        #[prost(message, optional, tag = "72295728")]
        pub(super) http: Option<Http>,
    }

    /// As much of `google.api.HttpRule`.
    #[derive(prost::Message)]
    pub(super) struct Http {
        #[prost(string, tag = "2")]
        pub(super) get: String,
        #[prost(string, tag = "3")]
        pub(super) put: String,
        #[prost(string, tag = "4")]
        pub(super) post: String,
        #[prost(string, tag = "5")]
        pub(super) delete: String,
        #[prost(string, tag = "6")]
        pub(super) patch: String,
    }

    impl Http {
        pub(super) fn method_and_path(self) -> (String, String) {
            let patterns = [
                ("GET", self.get),
                ("PUT", self.put),
                ("POST", self.post),
                ("DELETE", self.delete),
                ("PATCH", self.patch),
            ];
            let mut set = patterns.into_iter().filter(|(_, path)| !path.is_empty());
            let (method, path) = set.next().expect("a pattern");
            (method.to_owned(), path)
        }
    }

    #[derive(prost::Message)]
    pub(super) struct Rule {
        #[prost(int32, repeated, tag = "1")]
        pub(super) callers: Vec<i32>,
        #[prost(string, tag = "2")]
        pub(super) scope: String,
        #[prost(bool, tag = "3")]
        pub(super) session_only: bool,
    }
}
